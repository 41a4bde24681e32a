"""Nested values of tensors: what stages hand on to one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

__all__ = ["map_tensors"]


def map_tensors(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply a function to the tensors of equally nested values, place by place.

    Args:
        function: called with the tensors of one place.
        first, others: tuples, NamedTuples, mappings, dataclasses, None, and tensors in them.
            Whatever else is in them is taken from the first.

    Returns:
        the same nesting with the function's results.
    """
    if isinstance(first, Tensor):
        return function(first, *others)
    if isinstance(first, tuple):
        parts = [map_tensors(function, *same) for same in zip(first, *others)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if isinstance(first, Mapping):
        return {k: map_tensors(function, *(x[k] for x in (first, *others))) for k in first}
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first) if field.init]
        return replace(
            first,
            **{
                name: map_tensors(function, *(getattr(x, name) for x in (first, *others)))
                for name in names
            },
        )
    return first
