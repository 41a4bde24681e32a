"""Numbers of the host as tensors, without waiting for a device."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["constants"]


def constants(numbers: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,) the numbers, on the device; not to be written to.

    A copy from the host would wait for all work of the device. So a tensor is kept for the next
    call with the same numbers, and where a program is traced, it is filled on the device.
    """
    if torch.compiler.is_compiling() or not all(type(n) is int for n in numbers):
        return torch.stack([torch.full((), n, dtype=dtype, device=device) for n in numbers])
    return _kept(tuple(numbers), dtype, device)


@functools.lru_cache(maxsize=256)
def _kept(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be used in training later
        return torch.tensor(numbers, dtype=dtype, device=device)
