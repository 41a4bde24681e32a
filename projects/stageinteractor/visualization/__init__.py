"""Pictures: detections beside the ground truth, contact sheets, curves of a training."""

from .convergence import plot_convergence
from .curves import plot_ap_curves, plot_loss_curves, read_metrics
from .pictures import (
    contact_sheet,
    draw_detections,
    draw_ground_truth,
    save_picture,
    select_confident,
    side_by_side,
)

__all__ = [
    "contact_sheet",
    "draw_detections",
    "draw_ground_truth",
    "plot_ap_curves",
    "plot_convergence",
    "plot_loss_curves",
    "read_metrics",
    "save_picture",
    "select_confident",
    "side_by_side",
]
