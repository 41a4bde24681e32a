"""Terms of matching costs and losses, and what losses are divided by.

Letters: S stages, B images, N queries, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

__all__ = [
    "FOCAL_ALPHA",
    "FOCAL_GAMMA",
    "LabelNormalizer",
    "MatchNormalizer",
    "Normalizer",
    "SigmoidFocalLoss",
    "focal_cost",
]

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


class SigmoidFocalLoss(nn.Module):
    """Focal loss (Lin et al., ICCV 2017) of multi-hot targets, summed per stage."""

    def __init__(self, alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            logits: (S, B, N, K).
            targets: (S, B, N, K) in {0, 1}.

        Returns:
            (S,) sums over images, queries and classes.
        """
        loss = sigmoid_focal_loss(logits, targets, alpha=self.alpha, gamma=self.gamma)
        return loss.flatten(1).sum(1)


class Normalizer(ABC):
    """What the losses of a stage are divided by."""

    @abstractmethod
    def __call__(self, matched: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            matched: (S,) queries with an object, averaged over processes.
            labels: (S,) ones in the class targets, likewise.

        Returns:
            (S,) for the classification loss, and (S,) for the box losses.
        """


class MatchNormalizer(Normalizer):
    """Both losses by the matched queries (DETR)."""

    def __call__(self, matched: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return matched, matched


class LabelNormalizer(Normalizer):
    """The classification by labels or matched queries, whichever are more; boxes by the matched.

    For label assigners that give a query more or fewer labels than its own match has.
    """

    def __call__(self, matched: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.maximum(matched, labels), matched
