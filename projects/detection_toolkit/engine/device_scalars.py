"""Scalars of steps that stay on the device until they are to be written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DeviceScalars"]

# What to do with the values of an entry: name -> number, and the iteration that they are of.
Write = Callable[[Mapping[str, float], int], None]


class _Entry(NamedTuple):
    iteration: int
    names: tuple[str, ...]
    values: Tensor
    write: Write


class DeviceScalars:
    """Collects scalars of several steps, to be read together: each read waits for the device."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def add(self, names: Sequence[str], values: Tensor, *, iteration: int, write: Write) -> None:
        """
        Args:
            names: n of them.
            values: (n,), on the device.
            iteration: that they are of.
            write: called with names and numbers by :meth:`flush`.
        """
        self._entries.append(_Entry(iteration, tuple(names), values.detach().double(), write))

    def flush(self) -> None:
        """Read all that was collected, and write it in the order in which it came."""
        entries, self._entries = self._entries, []
        if not entries:
            return
        numbers = iter(torch.cat([entry.values for entry in entries]).tolist())
        for entry in entries:
            entry.write({name: next(numbers) for name in entry.names}, entry.iteration)
