"""Pictures: detections, what the stages do, label assignment, curves, reports.

Its parts are imported when they are first used: a run that draws nothing needs no Matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..on_demand import names_on_demand

if TYPE_CHECKING:
    from .animation import AnimationFrame, animate_stages, save_animation
    from .assignment import LabelDecision, LabelSource, draw_assignment, explain_labels
    from .convergence import plot_convergence
    from .curves import plot_ap_curves, plot_loss_curves, read_metrics
    from .paper import figure_stems, save_figure
    from .pictures import (
        DEFAULT_SCORE_THRESHOLD,
        contact_sheet,
        distinct_names,
        draw_detections,
        draw_ground_truth,
        save_picture,
        select_confident,
        side_by_side,
    )
    from .stage_traces import StageTrace, resize_trace, trace_stages
    from .stages import (
        choose_queries,
        draw_followed_query,
        draw_query_stages,
        draw_stages,
        level_colors,
        stage_colors,
    )
    from .viewers import LABEL_SIZE, STAGE_VIEWERS, StageViewer

__all__ = [
    "DEFAULT_SCORE_THRESHOLD",
    "LABEL_SIZE",
    "AnimationFrame",
    "STAGE_VIEWERS",
    "LabelDecision",
    "LabelSource",
    "StageTrace",
    "StageViewer",
    "animate_stages",
    "choose_queries",
    "contact_sheet",
    "distinct_names",
    "draw_assignment",
    "draw_detections",
    "draw_followed_query",
    "draw_ground_truth",
    "draw_query_stages",
    "draw_stages",
    "explain_labels",
    "figure_stems",
    "level_colors",
    "plot_ap_curves",
    "plot_convergence",
    "plot_loss_curves",
    "read_metrics",
    "resize_trace",
    "save_animation",
    "save_figure",
    "save_picture",
    "select_confident",
    "side_by_side",
    "stage_colors",
    "trace_stages",
]

__getattr__ = names_on_demand(
    __name__,
    {
        "AnimationFrame": "animation",
        "DEFAULT_SCORE_THRESHOLD": "pictures",
        "LABEL_SIZE": "viewers",
        "LabelDecision": "assignment",
        "LabelSource": "assignment",
        "STAGE_VIEWERS": "viewers",
        "StageTrace": "stage_traces",
        "StageViewer": "viewers",
        "animate_stages": "animation",
        "choose_queries": "stages",
        "contact_sheet": "pictures",
        "distinct_names": "pictures",
        "draw_assignment": "assignment",
        "draw_detections": "pictures",
        "draw_followed_query": "stages",
        "draw_ground_truth": "pictures",
        "draw_query_stages": "stages",
        "draw_stages": "stages",
        "explain_labels": "assignment",
        "figure_stems": "paper",
        "level_colors": "stages",
        "plot_ap_curves": "curves",
        "plot_convergence": "convergence",
        "plot_loss_curves": "curves",
        "read_metrics": "curves",
        "resize_trace": "stage_traces",
        "save_animation": "animation",
        "save_figure": "paper",
        "save_picture": "pictures",
        "select_confident": "pictures",
        "side_by_side": "pictures",
        "stage_colors": "stages",
        "trace_stages": "stage_traces",
    },
)
