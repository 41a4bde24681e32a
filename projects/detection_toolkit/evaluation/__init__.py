"""What a detector's stages do, measured on a data set; and comparisons of trained variants."""

from .coco import BACKENDS, CocoEvaluator
from .diagnosis import (
    LabelChanges,
    ScoreChanges,
    count_label_changes,
    count_score_changes,
    find_duplicates,
    match_detections,
)
from .inference import run_evaluator
from .losses import VALIDATION, LossEvaluator, build_loss_evaluator
from .stages import (
    AllStages,
    StageEvaluator,
    check_stage_evaluation,
    compared_label_assigners,
    configured_label_assigners,
    evaluate_stages,
)

__all__ = [
    "BACKENDS",
    "VALIDATION",
    "AllStages",
    "CocoEvaluator",
    "LabelChanges",
    "LossEvaluator",
    "ScoreChanges",
    "StageEvaluator",
    "build_loss_evaluator",
    "check_stage_evaluation",
    "compared_label_assigners",
    "configured_label_assigners",
    "count_label_changes",
    "count_score_changes",
    "evaluate_stages",
    "find_duplicates",
    "match_detections",
    "run_evaluator",
]
