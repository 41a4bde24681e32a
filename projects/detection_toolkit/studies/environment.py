"""Where figures come from: machine, versions, commit and date, kept beside them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision

from .. import __version__

__all__ = ["ROOT", "commit", "facts", "from_root", "machine", "processor", "today", "versions"]

ROOT = Path(__file__).resolve().parents[3]
"""Of the checkout, where train_net.py is."""


def processor() -> str:
    """Name of the CPU, as far as the system tells it."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What this process runs on."""
    return {
        "cpu": processor(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "detection_toolkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }


def commit() -> str | None:
    """Commit of the checkout, marked where code or configs differ from it; None outside git."""
    try:
        sha = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "projects", "configs", "train_net.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha + (" with local changes" if changed else "")


def today() -> str:
    """The date in UTC, as 2026-01-31."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def facts() -> dict[str, Any]:
    """All of them; threads are left out, as a measurement has its own number of them."""
    return {
        "machine": {k: v for k, v in machine().items() if k != "torch_threads"},
        "versions": versions(),
        "commit": commit(),
        "date": today(),
    }


def from_root(path: Path) -> str:
    """The path as one writes it in the root of the checkout."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
