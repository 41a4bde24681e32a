"""Pictures: detections, what the stages do, label assignment, curves, reports."""

from .assignment import LabelDecision, LabelSource, draw_assignment, explain_labels
from .convergence import plot_convergence
from .curves import plot_ap_curves, plot_loss_curves, read_metrics
from .paper import save_figure
from .pictures import (
    contact_sheet,
    draw_detections,
    draw_ground_truth,
    save_picture,
    select_confident,
    side_by_side,
)
from .stage_traces import StageTrace, check_has_stages, trace_stages
from .stages import choose_queries, draw_stages

__all__ = [
    "LabelDecision",
    "LabelSource",
    "StageTrace",
    "check_has_stages",
    "choose_queries",
    "contact_sheet",
    "draw_assignment",
    "draw_detections",
    "draw_ground_truth",
    "draw_stages",
    "explain_labels",
    "plot_ap_curves",
    "plot_convergence",
    "plot_loss_curves",
    "read_metrics",
    "save_figure",
    "save_picture",
    "select_confident",
    "side_by_side",
    "trace_stages",
]
