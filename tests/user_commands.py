"""Commands as users type them, run in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def call(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script, or ``-m`` and a module, from a folder and on the CPU; it must succeed."""
    environment = {
        "PYTHONPATH": str(ROOT / "projects"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done
