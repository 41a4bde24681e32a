"""The stages, most valuable first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..context import Stage
from .correct import correct
from .exports import exports
from .fast import fast
from .repeats import repeats
from .trains import trains

__all__ = ["STAGES", "StageOfReport", "seconds_of"]


class StageOfReport(NamedTuple):
    """A stage, and its share of the time."""

    run: Stage
    share: float


STAGES: Mapping[str, StageOfReport] = {
    "correct": StageOfReport(correct, 0.2),
    "fast": StageOfReport(fast, 0.3),
    "trains": StageOfReport(trains, 0.35),
    "repeats": StageOfReport(repeats, 0.08),
    "exports": StageOfReport(exports, 0.07),
}


def seconds_of(name: str, waiting: Sequence[str], seconds: float) -> float:
    """What a stage has of the seconds that are left for it and the others that wait."""
    return max(0.0, seconds) * STAGES[name].share / sum(STAGES[n].share for n in waiting)
