"""Matching, label assignment and losses. Nothing here sees features."""

from .criterion import BranchedCriterion, BranchedResult, Criterion, CriterionResult
from .label_assignment import LabelAssigner, StagewiseMatcher
from .losses import LabelNormalizer, MatchNormalizer, Normalizer, SigmoidFocalLoss, focal_cost
from .matcher import HungarianMatcher, MatchingCost

__all__ = [
    "BranchedCriterion",
    "BranchedResult",
    "Criterion",
    "CriterionResult",
    "HungarianMatcher",
    "LabelAssigner",
    "LabelNormalizer",
    "MatchNormalizer",
    "MatchingCost",
    "Normalizer",
    "SigmoidFocalLoss",
    "StagewiseMatcher",
    "focal_cost",
]
