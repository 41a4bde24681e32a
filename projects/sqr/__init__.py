"""Selective query recollection (SQR; Chen et al., CVPR 2023): training of cascaded decoders.

Later stages are also trained with queries that earlier stages left; inference is unchanged, and so
are the parameters. A schedule says which queries a stage is given; it works for any
:class:`~detection_toolkit.modeling.CascadeDecoder`.
"""

from . import moved_names  # noqa: F401
from .criterion import PathLabelAssigner, RecollectionCriterion, RecollectionResult
from .recollection import QueryRecollection, QueryState, recollect
from .schedule import (
    RecollectionSchedule,
    ScheduleError,
    dense_schedule,
    plain_schedule,
    selective_schedule,
)

__all__ = [
    "PathLabelAssigner",
    "QueryRecollection",
    "QueryState",
    "RecollectionCriterion",
    "RecollectionResult",
    "RecollectionSchedule",
    "ScheduleError",
    "dense_schedule",
    "plain_schedule",
    "recollect",
    "selective_schedule",
]
