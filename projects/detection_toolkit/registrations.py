"""Config files that register data sets may be executed more than once in a process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .errors import UserError

__all__ = ["repeatable_registrations"]


@contextlib.contextmanager
def repeatable_registrations() -> Iterator[None]:
    """While this lasts, a data set may be registered again by the same code with the same values.

    Registration and metadata then begin anew, as ``register_coco_instances`` sets both.

    Raises:
        UserError: a name is registered for something else.
    """
    register = DatasetCatalog.register

    def register_again(name: str, func: Callable[[], list[dict[str, Any]]]) -> None:
        if name in DatasetCatalog:
            # A loader that was changed meanwhile, to read a repaired copy, remembers its own.
            known = MetadataCatalog.get(name).get("original_loader", DatasetCatalog[name])
            if not _are_same(known, func):
                raise UserError(
                    f"the data set name {name!r} is registered already, for something else: use "
                    "another name"
                )
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
        register(name, func)

    before = vars(DatasetCatalog).get("register")
    DatasetCatalog.register = register_again
    try:
        yield
    finally:
        del DatasetCatalog.register
        if before is not None:
            DatasetCatalog.register = before


def _are_same(one: Any, other: Any) -> bool:
    """Whether two functions come from the same place and hold the same values."""
    if one is other or one == other:
        return True
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return False
    return (
        one.__code__ == other.__code__
        and one.__defaults__ == other.__defaults__
        and _held(one) == _held(other)
    )


def _held(function: FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]
