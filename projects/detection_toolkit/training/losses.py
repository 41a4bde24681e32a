"""Loss terms of one-stage-at-a-time supervision (focal, L1, GIoU)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

__all__ = ["FOCAL_ALPHA", "FOCAL_GAMMA", "focal_cost", "sigmoid_focal_loss_sum"]

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


def focal_cost(logits: Tensor, eps: float = 1e-12) -> Tensor:
    """Matching cost of a class: focal loss as a positive minus focal loss as background.

    Args:
        logits: logits of the class in question, any shape.
        eps: keeps the logarithms finite.

    Returns:
        same shape; lower is better.
    """
    p = logits.sigmoid()
    positive = -FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * torch.log(p + eps)
    negative = -(1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * torch.log(1 - p + eps)
    return positive - negative


def sigmoid_focal_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017) of multi-hot targets, summed per stage.

    Args:
        logits: (S, B, N, K).
        targets: (S, B, N, K) in {0, 1}.

    Returns:
        (S,) sums over images, queries and classes.
    """
    loss = sigmoid_focal_loss(logits, targets, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA)
    return loss.flatten(1).sum(1)
