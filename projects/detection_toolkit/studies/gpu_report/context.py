"""What a stage is given, and the rows that it yields."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .plan import GpuPlan

__all__ = ["Context", "Measure", "Row", "Stage", "rows_of"]


@dataclass(frozen=True)
class Row:
    """One line of a stage's table."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """Columns: numbers, texts, or None."""
    ok: bool | None = None
    """Whether a check holds; None: nothing was checked."""
    note: str = ""


@dataclass(frozen=True)
class Context:
    """
    Attributes:
        plan: what to do.
        device: where.
        folder: for what the stages write; theirs alone.
        to_plain: turns a decoder or criterion into another implementation with the same
            parameters; raises ValueError where there is none.
        deadline: of the stage, on the clock of ``time.monotonic``.
    """

    plan: GpuPlan
    device: torch.device
    folder: Path
    to_plain: Callable[[nn.Module], nn.Module]
    deadline: float

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds_left(self) -> float:
        """Until the stage is ended from outside."""
        return self.deadline - time.monotonic()


Stage = Callable[[Context], Iterator[Row]]
Measure = Callable[[], Iterator[Row]]


def rows_of(name: str, measure: Measure) -> Iterator[Row]:
    """The rows of one measurement; one that says what went wrong, in the place of an error.

    The next measurement goes on, except after errors of the device, which no longer answers then.
    """
    try:
        yield from measure()
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        text = " ".join(str(error).split())
        yield Row(name, ok=False, note=f"{type(error).__name__}: {text[:300]}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
