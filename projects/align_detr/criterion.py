"""The losses: IoU-aware labels, and weights by rank among the queries of an object.

Letters: S stages, B images, N queries, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.structures import Assignment, ClassTargets, GroundTruth, box_iou
from detection_toolkit.training import Criterion
from detection_toolkit.training.criterion import Outputs, Supervision, matched_objects

__all__ = ["AlignedCriterion", "AlignedLoss", "RankedCriterion", "repeats_of_stages"]

LEAST_QUALITY = 0.01
"""Of a matched query, however bad: its label stays above 0, by which it is known as matched."""


class AlignedLoss(nn.Module):
    """Binary cross-entropy of graded labels, where background counts by how sure the network is:

        sum over positives of BCE(p, y) + sum over all others of p^gamma BCE(p, 0)

    Gradients flow through the weight p^gamma, too.
    """

    def __init__(self, gamma: float = 2.0):
        super().__init__()
        self.gamma = gamma

    def weights(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(S, B, N, K) what each entry counts."""
        return torch.where(targets > 0, 1.0, logits.sigmoid() ** self.gamma)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            logits: (S, B, N, K).
            targets: (S, B, N, K) in [0, 1]; what is above 0 is a positive.

        Returns:
            (S,) sums over images, queries and classes.
        """
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (self.weights(logits, targets) * loss).flatten(1).sum(1)


class AlignedCriterion(Criterion):
    """The label of a matched query is the quality of its prediction, not 1:

        t = max(p^alpha IoU^(1 - alpha), 0.01)

    with p the probability of the object's class. No gradient goes through t.
    """

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0, **others: Any):
        """
        Args:
            alpha: of the class in the quality.
            gamma: see :class:`AlignedLoss`.
            others: as of :class:`~detection_toolkit.training.Criterion`, but for ``class_loss``.

        Raises:
            UserError: the label assigner may give a query labels that are not its match's.
        """
        super().__init__(class_loss=AlignedLoss(gamma), **others)
        if not self.label_assigner.one_label_per_match:
            raise UserError(
                "a graded label is that of the query's own match: set the criterion's "
                "label_assigner._target_=detection_toolkit.training.StagewiseMatcher"
            )
        self.alpha = alpha

    def supervise(
        self, outputs: Outputs, truth: GroundTruth, assignment: Assignment | None = None
    ) -> Supervision:
        """As :meth:`Criterion.supervise`, with graded labels."""
        supervision = super().supervise(outputs, truth, assignment)
        quality = self.quality(supervision)
        rank_weights = self.rank_weights(quality, supervision.assignment)
        labels = supervision.targets.multi_hot * (quality * rank_weights)[..., None]
        return supervision._replace(
            targets=ClassTargets(labels),
            box_weights=supervision.box_weights * rank_weights,
            counts=self.count(supervision),
        )

    @torch.no_grad()
    def quality(self, supervision: Supervision) -> Tensor:
        """(S, B, N) t of matched queries; anything for the others."""
        logits, boxes, truth, assignment, targets, *_ = supervision
        p = (logits.sigmoid() * targets.multi_hot).sum(-1)
        iou = box_iou(boxes, matched_objects(assignment, truth)).clamp(min=0)
        return (p**self.alpha * iou ** (1 - self.alpha)).clamp(min=LEAST_QUALITY)

    def rank_weights(self, quality: Tensor, assignment: Assignment) -> Tensor:
        """(S, B, N) what a match counts; here 1."""
        return torch.ones_like(quality)

    def count(self, supervision: Supervision) -> Tensor:
        """(S, 2) what both losses are divided by: the matches."""
        return supervision.counts[:, :1].repeat(1, 2)


def repeats_of_stages(num_stages: int, k: int = 2) -> list[int]:
    """How many queries an object is matched to at each stage: k, and one at the last, which is the
    answer."""
    return [k] * (num_stages - 1) + [1]


class RankedCriterion(AlignedCriterion):
    """Several queries are matched to an object, of which the better ones count more:

        rho = exp(-rank / tau)

    is a weight of the box losses and a factor of the label. Rank 0 is the query with the highest
    quality of those that the object has. The losses are divided by the objects, not by the matches.
    """

    def __init__(self, *, tau: float = 1.5, **others: Any):
        """
        Args:
            tau: how fast weights fall.
            others: as of :class:`AlignedCriterion`; the matcher has ``repeats``.
        """
        super().__init__(**others)
        self.tau = tau

    @torch.no_grad()
    def rank_weights(self, quality: Tensor, assignment: Assignment) -> Tensor:
        """(S, B, N) rho of matched queries; anything for the others."""
        return (-ranks(quality, assignment.object_index).to(quality.dtype) / self.tau).exp()

    def count(self, supervision: Supervision) -> Tensor:
        """(S, 2) the objects, twice."""
        return torch.full_like(supervision.counts, sum(supervision.truth.num_objects))

    def targets_of_truth(
        self, truth: GroundTruth, *, num_stages: int, num_queries: int
    ) -> list[int] | None:
        """As :meth:`Criterion.targets_of_truth`, but what the losses are divided by."""
        return [sum(truth.num_objects)] * num_stages


def ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """Place of each element among those of its group, highest score first.

    Args:
        scores: (..., N).
        groups: (..., N) whole numbers.

    Returns:
        (..., N) from 0 on.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, groups.gather(-1, order).sort(dim=-1, stable=True).indices)
    grouped = groups.gather(-1, order)
    place = torch.arange(groups.shape[-1], device=groups.device).expand_as(groups)
    begins = torch.ones_like(grouped, dtype=torch.bool)
    begins[..., 1:] = grouped[..., 1:] != grouped[..., :-1]
    first = torch.where(begins, place, 0).cummax(-1).values
    return torch.zeros_like(order).scatter(-1, order, place - first)
