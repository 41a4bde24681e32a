"""Matching, label assignment and losses. Nothing here sees features."""

from .criterion import Criterion, CriterionResult
from .label_assignment import StagewiseMatcher
from .losses import focal_cost, sigmoid_focal_loss_sum
from .matcher import HungarianMatcher, MatchingCost, NonFinitePredictionError

__all__ = [
    "Criterion",
    "CriterionResult",
    "HungarianMatcher",
    "MatchingCost",
    "NonFinitePredictionError",
    "StagewiseMatcher",
    "focal_cost",
    "sigmoid_focal_loss_sum",
]
