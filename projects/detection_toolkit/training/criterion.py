"""The criterion: from the predictions of all stages to the losses of all stages.

Letters: S stages, B images, N queries, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import NonFinitePredictionError, UserError
from ..structures import (
    Assignment,
    ClassTargets,
    GroundTruth,
    HeadOutput,
    Predictions,
    StageOutput,
    generalized_box_iou,
)
from ..structures.boxes import xyxy_norm
from .losses import LabelNormalizer, Normalizer, SigmoidFocalLoss

__all__ = [
    "BranchedCriterion",
    "BranchedResult",
    "Criterion",
    "CriterionResult",
    "Supervision",
    "matched_objects",
]

NO_OBJECT = -1e4
"""The logit of queries that do not count: whatever a class loss makes of it is 0 in float32."""

Outputs = Sequence["HeadOutput | StageOutput"]


class CriterionResult(NamedTuple):
    """Losses of every stage and what they were made from."""

    loss_cls: Tensor
    """(S,) weighted classification loss."""
    loss_bbox: Tensor
    """(S,) weighted L1 loss."""
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

    def as_dict(self, branch: str = "") -> dict[str, Tensor]:
        """Scalar losses under the names that Detectron2's trainers sum and log.

        Args:
            branch: whose losses these are; "" for the stages.
        """
        suffix = f"_{branch}" if branch else ""
        return {
            f"{name}{suffix}_stage{t}": value
            for name in ("loss_cls", "loss_bbox", "loss_giou")
            for t, value in enumerate(getattr(self, name).unbind())
        }


class Supervision(NamedTuple):
    """What a set of predictions is to learn, before the losses are normalised."""

    logits: Tensor
    """(S, B, N, K), at least float32."""
    boxes: Tensor
    """(S, B, N, 4), likewise."""
    truth: GroundTruth
    assignment: Assignment
    targets: ClassTargets
    box_weights: Tensor
    """(S, B, N) of the box losses; 0 without a match."""
    counts: Tensor
    """(S, 2): matched queries, and ones in the class targets."""

    @classmethod
    def of(
        cls,
        logits: Tensor,
        boxes: Tensor,
        truth: GroundTruth,
        assignment: Assignment,
        targets: ClassTargets,
    ) -> Supervision:
        """Every match counts alike."""
        weights = assignment.matched.to(boxes.dtype)
        counts = torch.stack([weights.sum((1, 2)), targets.multi_hot.sum((1, 2, 3))], dim=1)
        return cls(logits, boxes, truth, assignment, targets, weights, counts)


class Criterion(nn.Module):
    """Classification, L1 and GIoU loss of every stage under the matches of a matcher, with the
    class targets of a label assigner.

    The losses of a stage are sums over queries divided by what the normaliser makes of two counts:
    matched queries, and ones in the class targets. Both are averaged over processes *before* that,
    and never fall below one for the whole batch; so any split of a batch over processes, or over
    micro-batches when gradients are accumulated, has the losses of the whole.

    Regression is supervised by the stage's own match only: a label assigner does not touch it.
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
        class_loss: nn.Module | None = None,
        box_code: Callable[[Tensor, Tensor], Tensor] = xyxy_norm,
        giou_eps: float = 1e-6,
        normalizer: Normalizer | None = None,
    ):
        """
        Args:
            num_classes: K.
            matcher: e.g. :class:`~detection_toolkit.training.HungarianMatcher`.
            label_assigner: a :class:`~detection_toolkit.training.LabelAssigner`, for example
                :class:`~detection_toolkit.training.StagewiseMatcher`.
            class_weight, l1_weight, giou_weight: loss weights.
            class_loss: (S, B, N, K) logits and targets -> (S,) sums; by default
                :class:`~detection_toolkit.training.SigmoidFocalLoss`.
            box_code: linear function of (boxes, sizes of their images) whose L1 distance is a
                loss: :func:`~detection_toolkit.structures.boxes.xyxy_norm` or ``cxcywh_norm``.
            giou_eps: floor in square pixels of the union and the enclosing area.
            normalizer: by default :class:`~detection_toolkit.training.LabelNormalizer`.
        """
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.label_assigner = label_assigner
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.class_loss = SigmoidFocalLoss() if class_loss is None else class_loss
        self.box_code = box_code
        self.giou_eps = giou_eps
        self.normalizer = LabelNormalizer() if normalizer is None else normalizer

    @property
    def of_stages(self) -> Criterion:
        """The criterion of the plain cascade alone, without branches and routes."""
        return self

    def forward(
        self,
        predictions: Predictions,
        truth: GroundTruth,
        *,
        target_counts: Tensor | None = None,
    ) -> CriterionResult:
        """
        Args:
            predictions: of S stages; branches have no place here.
            truth: the objects of the batch.
            target_counts: (S, 2) as :meth:`count_targets` returns it, summed over all
                micro-batches of this process, when gradients are accumulated. By default this
                batch's own.

        Raises:
            NonFinitePredictionError: from the matcher, of this or of another process.
        """
        (result,) = _results([(self, predictions.stages, None)], truth, target_counts)
        return result

    @torch.no_grad()
    def count_targets(self, predictions: Predictions, truth: GroundTruth) -> Tensor:
        """(S, 2): matched queries, and ones in the class targets, of each stage in this batch."""
        with _without_autocast(truth):
            return self.supervise(predictions.stages, truth).counts

    def targets_of_truth(
        self, truth: GroundTruth, *, num_stages: int, num_queries: int
    ) -> list[int] | None:
        """What :meth:`count_targets` would count of any predictions.

        Args:
            truth: the objects of a batch.
            num_stages: S.
            num_queries: N.

        Returns:
            for each stage the matched queries, which are as many as the ones in the class targets;
            None where it takes predictions to know.
        """
        count = getattr(self.matcher, "count_matches", None)
        if count is None or not self.label_assigner.one_label_per_match:
            return None
        return count(truth.num_objects, num_stages=num_stages, num_queries=num_queries)

    def supervise(
        self, outputs: Outputs, truth: GroundTruth, assignment: Assignment | None = None
    ) -> Supervision:
        """Match, unless the assignment is given, and make class targets.

        Raises:
            NonFinitePredictionError: from the matcher.
        """
        # Half-precision predictions are raised to float32; float64 stays as it is.
        logits = torch.stack([x.logits for x in outputs])
        boxes = torch.stack([x.boxes for x in outputs])
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits, boxes, truth = logits.to(dtype), boxes.to(dtype), truth.to(dtype)
        active = _active(outputs)
        if assignment is None:
            predicted = logits.detach(), boxes.detach(), truth
            assignment = self.matcher(*predicted, *([] if active is None else [active]))
        if active is not None:
            logits = logits.masked_fill(~active[..., None], NO_OBJECT)
        targets = self.label_assigner(
            assignment, boxes.detach(), truth, num_classes=self.num_classes
        )
        return Supervision.of(logits, boxes, truth, assignment, targets)

    def losses(self, supervision: Supervision, matched: Tensor, labels: Tensor) -> CriterionResult:
        """
        Args:
            supervision: of this process.
            matched, labels: (S,) counts of the whole batch, averaged over processes.
        """
        logits, _, truth, assignment, targets, *_ = supervision
        cls_normalizer, box_normalizer = self.normalizer(matched, labels)
        l1, giou = self._box_loss_sums(supervision)
        loss_cls = self.class_loss(logits, targets.multi_hot) / cls_normalizer
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
    def loss_sums(self, outputs: Outputs, truth: GroundTruth) -> Tensor:
        """What :meth:`losses_of_sums` makes losses of, after it was added up over batches.

        Args:
            outputs: of S stages.
            truth: the objects of the batch.

        Returns:
            (S, 5): weighted sums of the classification, L1 and GIoU loss of this process' batch,
            matched queries, and ones in the class targets.

        Raises:
            NonFinitePredictionError: from the matcher.
        """
        with _without_autocast(truth):
            supervision = self.supervise(outputs, truth)
            counts = supervision.counts
            result = self.losses(supervision, *counts.clamp(min=1).unbind(1))
            sums = (
                result.loss_cls * result.cls_normalizer,
                result.loss_bbox * result.box_normalizer,
                result.loss_giou * result.box_normalizer,
            )
            return torch.cat([torch.stack(sums, 1), counts], 1)

    def losses_of_sums(self, sums: Tensor) -> Tensor:
        """(S, 3) classification, L1 and GIoU losses of all batches whose sums (S, 5) these are."""
        cls_normalizer, box_normalizer = self.normalizer(*sums[:, 3:].clamp(min=1).unbind(1))
        return sums[:, :3] / torch.stack([cls_normalizer, box_normalizer, box_normalizer], 1)

    def _box_loss_sums(self, supervision: Supervision) -> tuple[Tensor, Tensor]:
        """(S,) weighted sums of L1 (over image size) and of 1 - GIoU over matched queries.

        Rows without a match are weighted with zero instead of being left out, so that every
        parameter has a gradient in every step, also in a process whose images are all empty.
        """
        _, boxes, truth, assignment, _, weight, _ = supervision
        objects = matched_objects(assignment, truth)
        matched = assignment.matched
        # Where nothing is matched compare the box with itself: padding rows could overflow.
        objects = torch.where(matched[..., None], objects, boxes.detach())
        sizes = truth.image_sizes[None, :, None]  # (1, B, 1, 2)
        l1 = self.box_code(boxes - objects, sizes).abs().sum(-1) * weight
        giou = (1 - generalized_box_iou(boxes, objects, self.giou_eps)) * weight
        return l1.sum((1, 2)), giou.sum((1, 2))


def matched_objects(assignment: Assignment, truth: GroundTruth) -> Tensor:
    """(S, B, N, 4) boxes of the queries' objects; of any object where a query has none."""
    index = assignment.object_index.clamp(min=0)
    objects = truth.boxes[None].expand(len(index), -1, -1, -1)
    return objects.gather(2, index[..., None].expand(-1, -1, -1, 4))


def _active(outputs: Outputs) -> Tensor | None:
    """(S, B, N) the queries that count; None for all."""
    if all(x.active is None for x in outputs):
        return None
    every = torch.ones_like(outputs[0].logits[..., 0], dtype=torch.bool)
    return torch.stack([every if x.active is None else x.active for x in outputs])


class BranchedResult(NamedTuple):
    """Losses of the stages and of the branches beside them."""

    main: CriterionResult
    branches: dict[str, CriterionResult]

    @property
    def matched_accuracy(self) -> Tensor:
        """(S,) of the stages."""
        return self.main.matched_accuracy

    def as_dict(self) -> dict[str, Tensor]:
        """Scalar losses: of the stages, and with a branch's name in theirs those of the branch."""
        losses = self.main.as_dict()
        for name, result in self.branches.items():
            losses |= result.as_dict(name)
        return losses


class BranchedCriterion(nn.Module):
    """One criterion for the stages and one for each branch; one reduction over processes."""

    def __init__(self, main: Criterion, branches: Mapping[str, Criterion]):
        """
        Args:
            main: of the stages.
            branches: of the branches, by their names.
        """
        super().__init__()
        self.main = main
        self.branches = nn.ModuleDict(branches)

    @property
    def of_stages(self) -> Criterion:
        """The criterion of the stages alone."""
        return self.main

    @property
    def matcher(self) -> nn.Module:
        """Of the stages."""
        return self.main.matcher

    @property
    def label_assigner(self) -> nn.Module:
        """Of the stages."""
        return self.main.label_assigner

    def forward(
        self,
        predictions: Predictions,
        truth: GroundTruth,
        *,
        target_counts: Tensor | None = None,
    ) -> BranchedResult:
        """As :meth:`Criterion.forward`; the counts of the branches follow those of the stages.

        Raises:
            UserError: the predictions have other branches than this criterion.
            NonFinitePredictionError: from a matcher, of this or of another process.
        """
        main, *rest = _results(self._parts(predictions), truth, target_counts)
        return BranchedResult(main, dict(zip((b.name for b in predictions.branches), rest)))

    @torch.no_grad()
    def count_targets(self, predictions: Predictions, truth: GroundTruth) -> Tensor:
        """Counts of the stages, then of the branches in the order of the predictions."""
        with _without_autocast(truth):
            return torch.cat(
                [
                    criterion.supervise(outputs, truth, assignment).counts
                    for criterion, outputs, assignment in self._parts(predictions)
                ]
            )

    def targets_of_truth(
        self, truth: GroundTruth, *, num_stages: int, num_queries: int
    ) -> list[int] | None:
        """As :meth:`Criterion.targets_of_truth`; None, unless a subclass knows its branches."""
        return None

    def _parts(self, predictions: Predictions) -> list[tuple]:
        names = [branch.name for branch in predictions.branches]
        if sorted(names) != sorted(self.branches):
            raise UserError(
                f"the detector predicts the branches {sorted(names)}, but model.criterion.branches "
                f"supervises {sorted(self.branches)}"
            )
        return [
            (self.main, predictions.stages, None),
            *((self.branches[b.name], b.outputs, b.assignment) for b in predictions.branches),
        ]


def _without_autocast(truth: GroundTruth) -> torch.autocast:
    # Matching and losses need float32 whatever the autocast type of the network is.
    return torch.autocast(device_type=truth.boxes.device.type, enabled=False)


def _results(
    parts: Sequence[tuple], truth: GroundTruth, target_counts: Tensor | None
) -> list[CriterionResult]:
    """The losses of (criterion, outputs, assignment or None) each, after one reduction of all."""
    with _without_autocast(truth):
        try:
            supervisions = [
                criterion.supervise(outputs, truth, assignment)
                for criterion, outputs, assignment in parts
            ]
        except NonFinitePredictionError:
            # The other processes wait for this one's counts, and must not go on with theirs.
            if comm.get_world_size() > 1:
                num_counts = sum(len(outputs) for _, outputs, _ in parts)
                device = truth.boxes.device
                # Of the type of the others' counts, which is that of their class targets.
                dtype = torch.promote_types(parts[0][1][0].logits.dtype, torch.float32)
                nothing = torch.full((num_counts, 2), math.nan, device=device, dtype=dtype)
                torch.distributed.all_reduce(nothing)
            raise
        if target_counts is None:
            target_counts = torch.cat([supervision.counts for supervision in supervisions])
        counts = _average(target_counts).split([len(outputs) for _, outputs, _ in parts])
        return [
            criterion.losses(supervision, *of_part.unbind(1))
            for (criterion, *_), supervision, of_part in zip(parts, supervisions, counts)
        ]


def _average(target_counts: Tensor) -> Tensor:
    """Over processes; one object in the whole batch is the floor."""
    world_size = comm.get_world_size()
    if world_size > 1:
        target_counts = target_counts.clone()
        torch.distributed.all_reduce(target_counts)
        if target_counts.isnan().any():
            raise NonFinitePredictionError([])
    return target_counts.clamp(min=1).div(world_size)


@torch.no_grad()
def _matched_accuracy(logits: Tensor, assignment: Assignment, truth: GroundTruth) -> Tensor:
    index = assignment.object_index.clamp(min=0)
    labels = truth.labels[None].expand(len(logits), -1, -1).gather(2, index)
    correct = (logits.argmax(-1) == labels) & assignment.matched
    count = assignment.matched.sum((1, 2)).clamp(min=1)
    return 100.0 * correct.sum((1, 2)) / count
