"""Boxes, and the typed values that cross from one package to another."""

from .boxes import box_iou, generalized_box_iou
from .nested import map_tensors
from .outputs import (
    Assignment,
    Branch,
    ClassTargets,
    GroundTruth,
    HeadOutput,
    Predictions,
    Queries,
    StageOutput,
)

__all__ = [
    "Assignment",
    "Branch",
    "ClassTargets",
    "GroundTruth",
    "HeadOutput",
    "Predictions",
    "Queries",
    "StageOutput",
    "box_iou",
    "generalized_box_iou",
    "map_tensors",
]
