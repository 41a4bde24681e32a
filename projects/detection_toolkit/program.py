"""How the commands of the project are called: by scripts in a checkout, else by one command."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ["IS_CHECKOUT", "MODULE", "command_line", "command_names", "program", "training_line"]

_PACKAGE = Path(__file__).resolve().parent
MODULE = f"python -m {_PACKAGE.name}"
"""The command of any installation."""
IS_CHECKOUT = (_PACKAGE.parents[1] / "setup.py").is_file()

_SCRIPTS = {
    "train": "train_net.py",
    "eval": "train_net.py --eval-only",
    "predict": "demo/demo.py",
    "export": "tools/export.py",
    "check": "tools/check_dataset.py",
    "report": "tools/report.py",
    "compare": "tools/compare.py",
    "convert checkpoint": "tools/convert_checkpoint.py",
}


def program() -> str:
    """How this process was called: ``python tools/x.py``, ``python -m package``, or a command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    if sys.argv[0].endswith(".py"):
        return f"python {sys.argv[0]}"
    return Path(sys.argv[0]).name


def command_names() -> set[str]:
    """Names of the command of the installed project."""
    points = entry_points(group="console_scripts")
    return {point.name for point in points if point.value.startswith(f"{_PACKAGE.name}.")}


def command_line(command: str) -> str:
    """How a user of this process calls a command, for messages.

    Args:
        command: of the installed project, such as ``report``.
    """
    called = program()
    if called == MODULE or called in command_names():
        return f"{called} {command}"
    if IS_CHECKOUT:
        return f"python {_SCRIPTS[command]}"
    return f"{MODULE} {command}"


def training_line(data: object, *, image_root: object = None, format: str | None = None) -> str:
    """How a user of this process trains on data, for messages.

    Args:
        data, image_root, format: of the options of these names.
    """
    words = ["--data", str(data)]
    words += ["--image-root", str(image_root)] if image_root else []
    words += ["--format", format] if format else []
    return f"{command_line('train')} {shlex.join(words)}"
