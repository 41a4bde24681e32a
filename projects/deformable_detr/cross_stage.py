"""Cross-stage labels as the head of Deformable DETR that the authors of StageInteractor released.

It does not follow the rule of their paper, which
:class:`~detection_toolkit.training.LabelAssigner` s such as ``stageinteractor.CrossStageMatcher``
bring to any detector; these classes stand for what was released.

Letters: S stages, B images, N queries, K classes. ``t`` is the stage whose targets are made, ``k``
the stage that a label comes from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detection_toolkit.errors import UserError
from detection_toolkit.structures import Assignment, ClassTargets, GroundTruth, box_iou
from detection_toolkit.training import Criterion, LabelAssigner
from detection_toolkit.training.criterion import Outputs, Supervision

__all__ = ["AnyPairMatcher", "LastCandidateCriterion"]


class AnyPairMatcher(LabelAssigner):
    r"""Labels from any pair of matched queries.

    With g_k(q) the object that query q is matched to at stage k, and C(t) the candidates of stage
    t, targets are multi-hot:

        T_t[q, c] = 1  iff  for some k in C(t): g_k(q) exists, and some j that is matched at k to an
                            object of class c has IoU(box_t(j), g_k(q)) > iou_threshold.

    The paper has j = q alone.
    """

    name = "any_pair"
    iou_threshold: float

    def __init__(self, stage_offsets: Sequence[Sequence[int]], *, iou_threshold: float = 0.5):
        """
        Args:
            stage_offsets: for each stage t the offsets k - t of its candidates in their order;
                those that lead outside the decoder are left out.
            iou_threshold: IoU (exclusive) that a pair must exceed.

        Raises:
            UserError: a stage has no candidate.
        """
        super().__init__()
        self.iou_threshold = iou_threshold
        self.candidates: list[list[int]] = []
        """Of each stage."""
        for t, offsets in enumerate(stage_offsets):
            stages = [t + offset for offset in offsets if 0 <= t + offset < len(stage_offsets)]
            if not stages:
                raise UserError(f"stage_offsets leave stage {t} without a candidate: {offsets}")
            self.candidates.append(stages)

    def check_fits(self, num_stages: int) -> None:
        """
        Raises:
            UserError: the offsets are for another number of stages.
        """
        if len(self.candidates) != num_stages:
            raise UserError(
                f"stage_offsets has {len(self.candidates)} entries, "
                f"but the decoder has {num_stages} stages"
            )

    def sources(self, assignment: Assignment, boxes: Tensor, truth: GroundTruth) -> Tensor:
        """(S_t, B, N, S_k): candidates in which some query that is matched to the class of the
        query's own object covers that object at stage t."""
        num_stages, num_images, num_queries, _ = boxes.shape
        takes = torch.zeros(
            num_stages, num_images, num_queries, num_stages, dtype=torch.bool, device=boxes.device
        )
        labels = self._labels(assignment, truth)
        for t, k, pairs in self._pairs(assignment, boxes, truth):
            same_class = labels[k][:, :, None] == labels[k][:, None]
            takes[t, :, :, k] = (pairs & same_class).any(-1)
        return takes

    @torch.no_grad()
    def forward(
        self, assignment: Assignment, boxes: Tensor, truth: GroundTruth, *, num_classes: int
    ) -> ClassTargets:
        """Targets of all pairs; see :meth:`LabelAssigner.forward`."""
        targets = boxes.new_zeros(*boxes.shape[:3], num_classes)
        one_hot = F.one_hot(self._labels(assignment, truth), num_classes).to(boxes.dtype)
        for t, k, pairs in self._pairs(assignment, boxes, truth):
            targets[t] = torch.maximum(targets[t], (pairs.to(boxes.dtype) @ one_hot[k] > 0) * 1.0)
        return ClassTargets(targets)

    @staticmethod
    def _labels(assignment: Assignment, truth: GroundTruth) -> Tensor:
        """(S, B, N) class of each query's object; any, where it has none."""
        index = assignment.object_index.clamp(min=0)
        return truth.labels.expand(len(index), -1, -1).gather(2, index)

    def _pairs(self, assignment: Assignment, boxes: Tensor, truth: GroundTruth):
        """Of each stage t and candidate k (B, N, N): whether query j covers query q's object."""
        self.check_fits(len(boxes))
        index = assignment.object_index.clamp(min=0)[..., None].expand(-1, -1, -1, 4)
        objects = truth.boxes.expand(len(index), -1, -1, -1).gather(2, index)
        matched = assignment.matched
        for t, candidates in enumerate(self.candidates):
            for k in candidates:
                iou = box_iou(objects[k][:, :, None], boxes[t][:, None])
                both = matched[k][:, :, None] & matched[k][:, None]
                yield t, k, (iou > self.iou_threshold) & both


class LastCandidateCriterion(Criterion):
    """Boxes of a stage are supervised by the match of its last candidate, not by its own."""

    label_assigner: AnyPairMatcher

    def supervise(
        self, outputs: Outputs, truth: GroundTruth, assignment: Assignment | None = None
    ) -> Supervision:
        """As :meth:`Criterion.supervise`, with the matches of the last candidates."""
        logits, boxes, truth, own, targets, *_ = super().supervise(outputs, truth, assignment)
        last = [candidates[-1] for candidates in self.label_assigner.candidates]
        index = own.object_index[last]
        return Supervision.of(logits, boxes, truth, Assignment(index), targets)
