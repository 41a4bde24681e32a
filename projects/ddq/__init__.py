"""DDQ (Zhang et al., CVPR 2023): dense distinct queries for a DETR."""

from . import official_names  # noqa: F401  (registers the names of official weights)
from .criterion import DDQCriterion, DenseCriterion, QualityFocalLoss, TwiceSquashedCost
from .decoder import DDQDecoder
from .detector import DDQ
from .queries import DistinctQueries

__all__ = [
    "DDQ",
    "DDQCriterion",
    "DDQDecoder",
    "DenseCriterion",
    "DistinctQueries",
    "QualityFocalLoss",
    "TwiceSquashedCost",
]
