"""Boxes and the values that cross from one room of the code to another."""

from .boxes import (
    box_iou,
    box_to_xyzr,
    generalized_box_iou,
    intersection_over_foreground,
    xyzr_to_box,
)
from .nested import map_tensors
from .outputs import Assignment, ClassTargets, GroundTruth, StageOutput

__all__ = [
    "Assignment",
    "ClassTargets",
    "GroundTruth",
    "StageOutput",
    "box_iou",
    "box_to_xyzr",
    "generalized_box_iou",
    "intersection_over_foreground",
    "map_tensors",
    "xyzr_to_box",
]
