"""The losses: those of DINO, and of the dense queries, which grade the queries of an object.

Letters: S stages, B images, N queries, M objects, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.queries import EncoderProposals
from detection_toolkit.structures import Assignment, ClassTargets, GroundTruth, box_iou
from detection_toolkit.training import BranchedCriterion, Criterion, MatchNormalizer, focal_cost
from detection_toolkit.training.criterion import (
    NO_OBJECT,
    Outputs,
    Supervision,
    matched_objects,
)
from dino.detector import DENOISING

from .detector import DENSE
from .queries import DENSE_ENCODER

__all__ = ["DDQCriterion", "DenseCriterion", "QualityFocalLoss", "TwiceSquashedCost"]


class TwiceSquashedCost:
    """Focal cost of probabilities that are taken for logits, so that they are squashed twice.

    The released code does so for dense queries: class costs then differ little, and boxes decide.
    """

    def __call__(self, logits: Tensor) -> Tensor:
        """As :func:`~detection_toolkit.training.focal_cost`."""
        return focal_cost(logits.sigmoid())


class QualityFocalLoss(nn.Module):
    """Quality focal loss (Li et al., NeurIPS 2020), ``|y - p|^beta BCE(p, y)``, of graded labels
    y."""

    def __init__(self, beta: float = 2.0):
        super().__init__()
        self.beta = beta

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            logits: (S, B, N, K).
            targets: (S, B, N, K) in [0, 1].

        Returns:
            (S,) sums over images, queries and classes.
        """
        p = logits.sigmoid()
        loss = F.binary_cross_entropy(p, targets, reduction="none")
        return (loss * (targets - p).abs() ** self.beta).flatten(1).sum(1)


class DenseCriterion(Criterion):
    """Of dense queries, of which several are matched to an object; the better one of them counts
    more (paper, section 3.4).

    With m = p IoU^6 of a query matched to object g, p being the probability of its class,

        a = m / max_g m * max_g IoU

    is the label of the query, the weight of its GIoU loss, and in sum what both losses are divided
    by. There is no L1 loss. An image without objects has no loss.
    """

    def __init__(self, *, iou_power: float = 6.0, beta: float = 2.0, **others: Any):
        """
        Args:
            iou_power: of the IoU in m.
            beta: see :class:`QualityFocalLoss`.
            others: as of :class:`~detection_toolkit.training.Criterion`, but for ``class_loss``,
                ``l1_weight`` and ``normalizer``.
        """
        super().__init__(
            class_loss=QualityFocalLoss(beta), l1_weight=0.0, normalizer=MatchNormalizer(), **others
        )
        self.iou_power = iou_power

    def supervise(
        self, outputs: Outputs, truth: GroundTruth, assignment: Assignment | None = None
    ) -> Supervision:
        """As :meth:`Criterion.supervise`, with graded labels."""
        supervision = super().supervise(outputs, truth, assignment)
        grades = self.grades(supervision)
        some = torch.tensor(truth.num_objects) > 0
        some = some.to(grades.device, non_blocking=True)[:, None, None]
        return supervision._replace(
            logits=supervision.logits.masked_fill(~some, NO_OBJECT),
            targets=ClassTargets(supervision.targets.multi_hot * grades[..., None]),
            box_weights=grades,
            counts=grades.sum((1, 2))[:, None].repeat(1, 2),
        )

    @torch.no_grad()
    def grades(self, supervision: Supervision) -> Tensor:
        """(S, B, N) a, 0 without a match."""
        logits, boxes, truth, assignment, targets, *_ = supervision
        matched = assignment.matched
        p = (logits.sigmoid() * targets.multi_hot).sum(-1)
        iou = box_iou(boxes, matched_objects(assignment, truth)).clamp(min=0) * matched
        alignment = p * iou**self.iou_power
        index = assignment.object_index.clamp(min=0)
        best, best_iou = (_best(x, index, truth.boxes.shape[1]) for x in (alignment, iou))
        return alignment / (best + 1e-7) * best_iou


def _best(values: Tensor, index: Tensor, num_objects: int) -> Tensor:
    """(S, B, N) the largest value, 0 or more, that a query of the same object has."""
    best = values.new_zeros(*values.shape[:2], num_objects)
    return best.scatter_reduce(2, index, values, reduce="amax").gather(2, index)


class DDQCriterion(BranchedCriterion):
    """Losses of the stages, of the proposals, of the dense queries and theirs, and of denoising."""

    def __init__(
        self,
        main: Criterion,
        *,
        encoder: Criterion,
        dense: DenseCriterion,
        dense_encoder: DenseCriterion,
        denoising: Criterion | None = None,
    ):
        """
        Args:
            main: of the stages.
            encoder: of the proposals of the distinct queries.
            dense: of the stages' dense queries.
            dense_encoder: of the proposals of the dense queries.
            denoising: None where the detector has none.
        """
        branches: dict[str, Criterion] = {
            EncoderProposals.branch: encoder,
            DENSE: dense,
            DENSE_ENCODER: dense_encoder,
        }
        if denoising is not None:
            branches[DENOISING] = denoising
        super().__init__(main, branches)
