"""Packages that import their modules when one of their names is first used.

So a command line prints its help without PyTorch, and a run without pictures goes without
Matplotlib. Such a package names what it offers in ``__all__``, as others do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from . import require_detectron2

__all__ = ["names_on_demand"]


def names_on_demand(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``.

    No name may be that of a module, which takes its place once it is imported.

    Args:
        package: its ``__name__``.
        modules: by a name of the package, the module in it that has it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(f"{package}.{modules[name]}")
        except Exception:
            require_detectron2()  # says why, if that is the reason
            raise
        return getattr(module, name)

    return get
