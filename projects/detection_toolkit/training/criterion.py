"""The criterion: from the outputs of all stages to the losses of all stages.

Letters: S stages, B images, N queries, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..structures import Assignment, ClassTargets, GroundTruth, StageOutput, generalized_box_iou
from .losses import sigmoid_focal_loss_sum
from .matcher import NonFinitePredictionError

__all__ = ["Criterion", "CriterionResult"]


class CriterionResult(NamedTuple):
    """Losses of every stage and what they were made from."""

    loss_cls: Tensor
    """(S,) weighted classification loss."""
    loss_bbox: Tensor
    """(S,) weighted L1 loss of the corners."""
    loss_giou: Tensor
    """(S,) weighted GIoU loss."""
    assignment: Assignment
    class_targets: ClassTargets
    cls_normalizer: Tensor
    """(S,)"""
    box_normalizer: Tensor
    """(S,)"""
    matched_accuracy: Tensor
    """(S,) share in percent of this process's matched queries whose highest logit is the class
    of their match; 0 where nothing is matched. No gradient."""

    def as_dict(self) -> dict[str, Tensor]:
        """Scalar losses under the names that Detectron2's trainers sum and log."""
        names = ("loss_cls", "loss_bbox", "loss_giou")
        return {
            f"{name}_stage{t}": value
            for name in names
            for t, value in enumerate(getattr(self, name).unbind())
        }


class Criterion(nn.Module):
    """Focal, L1 and GIoU loss of every stage under one-to-one matching, with the class targets
    of a label assigner.

    With t a stage, the losses are sums over queries divided by

        n_cls(t) = max(matched queries of t, ones in the class targets of t),
        n_box(t) = matched queries of t.

    Both counts are averaged over processes *before* the maximum is taken, and never fall below
    one for the whole batch; so any split of a batch over processes, or over micro-batches when
    gradients are accumulated, has the losses of the whole.

    Regression is supervised by the stage's own match only: the cross-stage step does not touch
    it.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        matcher: nn.Module,
        label_assigner: nn.Module,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
    ):
        """
        Args:
            num_classes: K.
            matcher: e.g. :class:`~detection_toolkit.training.HungarianMatcher`.
            label_assigner: :class:`~stageinteractor.CrossStageMatcher`, or
                :class:`~detection_toolkit.training.StagewiseMatcher` for the baseline.
            class_weight, l1_weight, giou_weight: loss weights.
        """
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.label_assigner = label_assigner
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight

    def forward(
        self,
        outputs: Sequence[StageOutput],
        truth: GroundTruth,
        *,
        target_counts: Tensor | None = None,
    ) -> CriterionResult:
        """
        Args:
            outputs: the S stages' predictions.
            truth: the objects of the batch.
            target_counts: (S, 2) as :meth:`count_targets` returns it, summed over all
                micro-batches of this process, when gradients are accumulated. By default this
                batch's own.

        Raises:
            NonFinitePredictionError: from the matcher, of this or of another process.
        """
        # Matching and losses need float32 whatever the autocast type of the network is.
        with torch.autocast(device_type=truth.boxes.device.type, enabled=False):
            logits, boxes = self._stack(outputs)
            truth = truth.to(boxes.dtype)
            try:
                assignment, targets = self.assign(logits.detach(), boxes.detach(), truth)
            except NonFinitePredictionError:
                # The other processes wait for this one's counts, and must not go on with theirs.
                if comm.get_world_size() > 1:
                    torch.distributed.all_reduce(logits.new_full((len(logits), 2), math.nan))
                raise
            if target_counts is None:
                target_counts = _count(assignment, targets)
            cls_normalizer, box_normalizer = _normalizers(target_counts)

            loss_cls = sigmoid_focal_loss_sum(logits, targets.multi_hot) / cls_normalizer
            l1, giou = self._box_loss_sums(boxes, assignment, truth)
            return CriterionResult(
                loss_cls=self.class_weight * loss_cls,
                loss_bbox=self.l1_weight * l1 / box_normalizer,
                loss_giou=self.giou_weight * giou / box_normalizer,
                assignment=assignment,
                class_targets=targets,
                cls_normalizer=cls_normalizer,
                box_normalizer=box_normalizer,
                matched_accuracy=_matched_accuracy(logits.detach(), assignment, truth),
            )

    @torch.no_grad()
    def count_targets(self, outputs: Sequence[StageOutput], truth: GroundTruth) -> Tensor:
        """(S, 2): matched queries, and ones in the class targets, of each stage in this batch."""
        with torch.autocast(device_type=truth.boxes.device.type, enabled=False):
            logits, boxes = self._stack(outputs)
            return _count(*self.assign(logits, boxes, truth.to(boxes.dtype)))

    @torch.no_grad()
    def assign(
        self, logits: Tensor, boxes: Tensor, truth: GroundTruth
    ) -> tuple[Assignment, ClassTargets]:
        """One-to-one matches and class targets of (S, B, N, K) logits, (S, B, N, 4) boxes."""
        assignment = self.matcher(logits, boxes, truth)
        targets = self.label_assigner(assignment, boxes, truth, num_classes=self.num_classes)
        return assignment, targets

    @staticmethod
    def _stack(outputs: Sequence[StageOutput]) -> tuple[Tensor, Tensor]:
        # Half-precision predictions are raised to float32; float64 stays as it is.
        logits = torch.stack([x.logits for x in outputs])
        boxes = torch.stack([x.boxes for x in outputs])
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(dtype), boxes.to(dtype)

    @staticmethod
    def _box_loss_sums(
        boxes: Tensor, assignment: Assignment, truth: GroundTruth
    ) -> tuple[Tensor, Tensor]:
        """(S,) sums of corner L1 (over image size) and of 1 - GIoU over matched queries.

        Rows without a match are weighted with zero instead of being left out, so that every
        parameter has a gradient in every step, also in a process whose images are all empty.
        """
        index = assignment.object_index.clamp(min=0)  # (S, B, N)
        objects = truth.boxes[None].expand(len(boxes), -1, -1, -1)
        objects = objects.gather(2, index[..., None].expand(-1, -1, -1, 4))
        matched = assignment.matched
        # Where nothing is matched compare the box with itself: padding rows could overflow.
        objects = torch.where(matched[..., None], objects, boxes.detach())
        size = truth.image_sizes.repeat(1, 2)[None, :, None]  # (1, B, 1, 4): w, h, w, h
        weight = matched.to(boxes.dtype)
        l1 = ((boxes - objects) / size).abs().sum(-1) * weight
        giou = (1 - generalized_box_iou(boxes, objects)) * weight
        return l1.sum((1, 2)), giou.sum((1, 2))


def _count(assignment: Assignment, targets: ClassTargets) -> Tensor:
    matched = assignment.matched.sum((1, 2)).to(targets.multi_hot.dtype)
    return torch.stack([matched, targets.multi_hot.sum((1, 2, 3))], dim=1)


def _normalizers(target_counts: Tensor) -> tuple[Tensor, Tensor]:
    world_size = comm.get_world_size()
    if world_size > 1:
        target_counts = target_counts.clone()
        torch.distributed.all_reduce(target_counts)
        if target_counts.isnan().any():
            raise NonFinitePredictionError([])
    # One object in the whole batch is the floor; the reference divides by zero without any.
    matched, ones = target_counts.clamp(min=1).div(world_size).unbind(1)
    return torch.maximum(matched, ones), matched


@torch.no_grad()
def _matched_accuracy(logits: Tensor, assignment: Assignment, truth: GroundTruth) -> Tensor:
    index = assignment.object_index.clamp(min=0)
    labels = truth.labels[None].expand(len(logits), -1, -1).gather(2, index)
    correct = (logits.argmax(-1) == labels) & assignment.matched
    count = assignment.matched.sum((1, 2)).clamp(min=1)
    return 100.0 * correct.sum((1, 2)) / count
