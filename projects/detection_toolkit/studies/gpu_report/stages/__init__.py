"""The stages, most valuable first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..context import Stage
from .correct import correct
from .exports import exports
from .fast import fast
from .repeats import repeats
from .trains import trains

__all__ = ["STAGES", "StageOfReport"]


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
