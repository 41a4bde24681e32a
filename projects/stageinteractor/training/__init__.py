"""Matching, cross-stage label assignment and losses. Nothing here sees features."""

from .criterion import Criterion, CriterionResult
from .cross_stage_matcher import CrossStageMatcher, StagewiseMatcher
from .losses import focal_cost, sigmoid_focal_loss_sum
from .matcher import HungarianMatcher, MatchingCost, NonFinitePredictionError

__all__ = [
    "Criterion",
    "CriterionResult",
    "CrossStageMatcher",
    "HungarianMatcher",
    "MatchingCost",
    "NonFinitePredictionError",
    "StagewiseMatcher",
    "focal_cost",
    "sigmoid_focal_loss_sum",
]
