"""Losses of all groups of a recollection schedule.

Letters: S stages, G groups of all stages together, P paths, B images, N queries, K classes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detection_toolkit.errors import NonFinitePredictionError
from detection_toolkit.structures import Assignment, ClassTargets, GroundTruth, Predictions
from detection_toolkit.training import (
    BranchedCriterion,
    BranchedResult,
    Criterion,
    CriterionResult,
)

from .schedule import RecollectionSchedule

__all__ = ["PathLabelAssigner", "RecollectionCriterion", "RecollectionResult"]


class PathLabelAssigner(nn.Module):
    """Gathers labels along the path of each group, with a label assigner for plain cascades.

    The way of a query from the initial state through one group after another is a cascade of its
    own, and is treated as one: a group may take labels from the groups that its input has passed,
    and from those in which it goes on, to the end of the decoder. Where the path leaves a stage
    out, the query stays as it is, and with it its match and its box. The path of the last groups
    is the plain cascade.
    """

    group_of_path: Tensor
    stage_of_group: Tensor
    path_of_group: Tensor

    def __init__(self, label_assigner: nn.Module, schedule: RecollectionSchedule):
        """
        Args:
            label_assigner: e.g. :class:`~stageinteractor.CrossStageMatcher`.
            schedule: the groups.
        """
        super().__init__()
        self.label_assigner = label_assigner
        for name, places in (
            ("group_of_path", schedule.paths()),
            ("stage_of_group", schedule.stage_of_group),
            ("path_of_group", schedule.path_of_group()),
        ):
            self.register_buffer(name, torch.tensor(places), persistent=False)

    @property
    def one_label_per_match(self) -> bool:
        """As of the label assigner that it gathers labels with."""
        return self.label_assigner.one_label_per_match

    @torch.no_grad()
    def forward(
        self, assignment: Assignment, boxes: Tensor, truth: GroundTruth, *, num_classes: int
    ) -> ClassTargets:
        """As the label assigners of plain cascades, with G groups in the place of S stages.

        Args:
            assignment: one-to-one matches (G, B, N).
            boxes: (G, B, N, 4) refined boxes, ``xyxy`` in pixels.
            truth: the objects.
            num_classes: K.

        Returns:
            targets (G, B, N, K).
        """
        num_paths, num_stages = self.group_of_path.shape
        # Row G, where -1 leads to, stands for stages before a path begins: no query has a match.
        index = assignment.object_index
        index = torch.cat([index, torch.full_like(index[:1], -1)])[self.group_of_path.T]
        boxes = torch.cat([boxes, boxes[:1]])[self.group_of_path.T]  # (S, P, B, N, 4)
        along_paths = self.label_assigner(
            Assignment(index.flatten(1, 2)),
            boxes.flatten(1, 2),
            _repeat(truth, num_paths),
            num_classes=num_classes,
        )
        multi_hot = along_paths.multi_hot.unflatten(1, (num_paths, -1))
        return ClassTargets(multi_hot[self.stage_of_group, self.path_of_group])


def _repeat(truth: GroundTruth, times: int) -> GroundTruth:
    return GroundTruth(
        truth.boxes.repeat(times, 1, 1),
        truth.labels.repeat(times, 1),
        truth.num_objects * times,
        truth.image_sizes.repeat(times, 1),
    )


class RecollectionResult(NamedTuple):
    """Losses of every stage, and those of every group."""

    loss_cls: Tensor
    """(S,) weighted classification loss, summed over the stage's groups."""
    loss_bbox: Tensor
    """(S,) weighted L1 loss of the corners, likewise."""
    loss_giou: Tensor
    """(S,) weighted GIoU loss, likewise."""
    matched_accuracy: Tensor
    """(S,) share in percent of the matched queries of the plain cascade whose highest logit is
    the class of their match."""
    groups: CriterionResult
    """Everything of every group, with G in the place of S."""
    branches: Mapping[str, CriterionResult]
    """Of what is supervised beside the stages, by its name."""

    def as_dict(self) -> dict[str, Tensor]:
        """Scalar losses of the stages, then of the branches, under the names that Detectron2's
        trainers sum and log."""
        stages = self.groups._replace(
            loss_cls=self.loss_cls, loss_bbox=self.loss_bbox, loss_giou=self.loss_giou
        )
        return BranchedResult(stages, dict(self.branches)).as_dict()


class RecollectionCriterion(nn.Module):
    """Supervises every group by itself and adds up the losses of a stage.

    Each group has its own one-to-one matching, its own normalisers, and weight 1: stage t counts
    as often as it has groups. Branches beside the stages, such as a two-stage detector's proposals,
    are supervised once, as without recollection.
    """

    def __init__(self, criterion: Criterion | BranchedCriterion, schedule: RecollectionSchedule):
        """
        Args:
            criterion: of the plain detector; it is copied.
            schedule: the groups.
        """
        super().__init__()
        self.schedule = schedule
        # To the plain criterion every group is a stage. Only the label assigner looks at more
        # than one of them at a time.
        self.criterion = copy.deepcopy(criterion)
        assigner = PathLabelAssigner(criterion.label_assigner, schedule)
        self.criterion.of_stages.label_assigner = assigner

    @property
    def of_stages(self) -> Criterion:
        """The plain detector's, for a plain cascade."""
        criterion = copy.deepcopy(self.criterion.of_stages)
        criterion.label_assigner = self.label_assigner
        return criterion

    @property
    def matcher(self) -> nn.Module:
        """The plain detector's, for one stage or many."""
        return self.criterion.matcher

    @property
    def label_assigner(self) -> nn.Module:
        """The plain detector's, for a plain cascade."""
        return self.criterion.label_assigner.label_assigner

    def forward(
        self,
        predictions: Predictions,
        truth: GroundTruth,
        *,
        target_counts: Tensor | None = None,
    ) -> RecollectionResult:
        """
        Args:
            predictions: those of the G groups in the place of stages, as :func:`sqr.recollect`
                returns them, and of the branches.
            truth: the objects of the batch.
            target_counts: (G, 2) and those of the branches, as :meth:`count_targets` returns them,
                when gradients are accumulated; see :class:`~detection_toolkit.training.Criterion`.

        Raises:
            NonFinitePredictionError: from the matcher.
        """
        with self._stages_in_errors():
            result = self.criterion(predictions, truth, target_counts=target_counts)
        branched = isinstance(result, BranchedResult)
        groups, branches = (result.main, result.branches) if branched else (result, {})
        sizes = self.schedule.groups_per_stage
        plain = [self.schedule.groups(t)[-1] for t in range(self.schedule.num_stages)]
        return RecollectionResult(
            loss_cls=_sum_of_stages(groups.loss_cls, sizes),
            loss_bbox=_sum_of_stages(groups.loss_bbox, sizes),
            loss_giou=_sum_of_stages(groups.loss_giou, sizes),
            matched_accuracy=groups.matched_accuracy[plain],
            groups=groups,
            branches=branches,
        )

    def count_targets(self, predictions: Predictions, truth: GroundTruth) -> Tensor:
        """(G, 2): matched queries, and ones in the class targets, of each group in this batch;
        then those of the branches."""
        with self._stages_in_errors():
            return self.criterion.count_targets(predictions, truth)

    def targets_of_truth(
        self, truth: GroundTruth, *, num_stages: int, num_queries: int
    ) -> list[int] | None:
        """As :meth:`Criterion.targets_of_truth`, of each group."""
        return self.criterion.targets_of_truth(
            truth, num_stages=self.schedule.num_groups, num_queries=num_queries
        )

    @contextlib.contextmanager
    def _stages_in_errors(self) -> Iterator[None]:
        """What the plain criterion takes for stages are groups: name the stages in its error."""
        try:
            yield
        except NonFinitePredictionError as error:
            stage_of_group = self.schedule.stage_of_group
            where = {(stage_of_group[group], image) for group, image in error.where}
            raise NonFinitePredictionError(sorted(where)) from error


def _sum_of_stages(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """(G,) -> (S,)."""
    return torch.stack([part.sum() for part in values.split(list(sizes))])
