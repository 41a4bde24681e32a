"""Numbers of the host as tensors, without waiting for a device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["collect_constants", "constants"]

_collected: ContextVar[list[Tensor] | None] = ContextVar("collected", default=None)


def constants(numbers: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,) the numbers, on the device; not to be written to.

    A copy from the host would wait for all work of the device. So a tensor is kept for the next
    call with the same numbers, and where a program is traced, it is filled on the device.
    """
    if torch.compiler.is_compiling() or not all(type(n) is int for n in numbers):
        return torch.stack([torch.full((), n, dtype=dtype, device=device) for n in numbers])
    tensor = _kept(tuple(numbers), dtype, device)
    collected = _collected.get()
    if collected is not None:
        collected.append(tensor)
    return tensor


@contextlib.contextmanager
def collect_constants() -> Iterator[list[Tensor]]:
    """A list of the constants that are read meanwhile.

    Whoever reads their memory later, as a CUDA graph does, has to hold them: they are not kept
    for ever.
    """
    collected: list[Tensor] = []
    before = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(before)


@functools.lru_cache(maxsize=256)
def _kept(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be used in training later
        return torch.tensor(numbers, dtype=dtype, device=device)
