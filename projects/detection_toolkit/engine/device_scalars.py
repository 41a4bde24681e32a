"""Scalars of steps that stay on the device until they are to be written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

__all__ = ["DeviceScalars"]

# What to do with the values of an entry: name -> number, and the iteration that they are of.
Write = Callable[[Mapping[str, float], int], None]


# How values of several processes become one.
REDUCTIONS = {"mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class _Entry:
    iteration: int
    names: tuple[str, ...]
    values: Tensor
    write: Write | None
    reduction: str | None


class DeviceScalars:
    """Collects scalars of several steps, to be read together: each read waits for the device.

    Those of several processes are reduced then, too, and not at every step.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def add(
        self,
        names: Sequence[str],
        values: Tensor,
        *,
        iteration: int,
        write: Write | None,
        reduction: str | None = None,
    ) -> None:
        """
        Args:
            names: n of them.
            values: (n,), on the device.
            iteration: that they are of.
            write: called with names and numbers by :meth:`flush`; None where another process
                writes them.
            reduction: over processes, all of which add them: "mean" or "max"; None: they are of
                this process alone.
        """
        values = values.detach().double()
        self._entries.append(_Entry(iteration, tuple(names), values, write, reduction))

    def flush(self, *, alone: bool = False) -> None:
        """Read all that was collected, and write it in the order in which it came.

        Args:
            alone: the other processes may not be there any more: what they have is left out.
        """
        entries, self._entries = self._entries, []
        if comm.get_world_size() > 1 and not alone:
            entries = _reduced(entries)
        entries = [entry for entry in entries if entry.write is not None]
        if not entries:
            return
        numbers = iter(torch.cat([entry.values for entry in entries]).tolist())
        for entry in entries:
            assert entry.write is not None
            entry.write({name: next(numbers) for name in entry.names}, entry.iteration)


def _reduced(entries: list[_Entry]) -> list[_Entry]:
    """The same entries over all processes, by one exchange for each kind of reduction."""
    entries = list(entries)
    for reduction, operation in REDUCTIONS.items():
        places = [i for i, entry in enumerate(entries) if entry.reduction == reduction]
        if not places:
            continue
        values = torch.cat([entries[i].values for i in places])
        dist.all_reduce(values, op=operation)
        if reduction == "mean":
            values = values / comm.get_world_size()
        for i, part in zip(places, values.split([len(entries[i].values) for i in places])):
            entries[i] = replace(entries[i], values=part)
    return entries
