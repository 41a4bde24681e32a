"""The losses: of the stages, of the encoder's choice, and of the denoising queries."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from deformable_detr.queries import EncoderProposals
from detection_toolkit.training import (
    BranchedCriterion,
    Criterion,
    SigmoidFocalLoss,
    focal_cost,
)

from .detector import DENOISING

__all__ = ["DenoisingCriterion", "FocalCost", "PositiveFocalLoss"]


class DenoisingCriterion(BranchedCriterion):
    """Losses of the stages, of the proposals that the queries are chosen from, and of denoising.

    Label assigners are each branch's own: cross-stage labels of ``main`` reach no other.
    """

    def __init__(
        self,
        main: Criterion,
        *,
        encoder: Criterion | None = None,
        denoising: Criterion | None = None,
    ):
        """
        Args:
            main: of the stages.
            encoder: of the proposals; None where the queries are no proposals.
            denoising: None where the detector has none.
        """
        branches = {EncoderProposals.branch: encoder, DENOISING: denoising}
        super().__init__(main, {name: x for name, x in branches.items() if x is not None})


class PositiveFocalLoss(SigmoidFocalLoss):
    """Focal loss of the queries that have a label.

    Of DN-DETR's denoising queries the others are no background, but slots that nothing fills.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """As :meth:`SigmoidFocalLoss.forward`."""
        loss = sigmoid_focal_loss(logits, targets, alpha=self.alpha, gamma=self.gamma)
        return (loss * (targets.amax(-1, keepdim=True) > 0)).flatten(1).sum(1)


class FocalCost:
    """:func:`~detection_toolkit.training.focal_cost` with another eps than its own."""

    def __init__(self, eps: float):
        """
        Args:
            eps: 1e-8 in the authors' code and in detrex, 1e-12 in MMDetection.
        """
        self.eps = eps

    def __call__(self, logits: Tensor) -> Tensor:
        """As :func:`~detection_toolkit.training.focal_cost`."""
        return focal_cost(logits, self.eps)
