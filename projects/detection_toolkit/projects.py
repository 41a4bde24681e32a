"""The packages beside this one: whoever adds a detector adds a package, and it is found."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ["GROUP", "import_projects", "project_names"]

GROUP = "detection_toolkit.projects"
"""Entry points of installed packages that register detectors; ``pyproject.toml`` names them."""

_HERE = Path(__file__).resolve().parent


@cache
def project_names() -> tuple[str, ...]:
    """Names of the packages that build on this one, in order.

    Installed ones say so by an entry point of :data:`GROUP`. In a checkout, where nothing need be
    installed, they are the folders beside this one. Entry points of all that is installed are read
    once in a process: a saved config asks for each of its parts.
    """
    points = entry_points(group=GROUP)
    names = {point.value for point in points}
    if (_HERE.parents[1] / "setup.py").is_file():
        names |= {path.parent.name for path in _HERE.parent.glob("*/__init__.py")}
    return tuple(sorted(names - {_HERE.name}))


def import_projects() -> None:
    """Import all of them, so that what each registers is there, whichever a config uses."""
    for name in project_names():
        import_module(name)
