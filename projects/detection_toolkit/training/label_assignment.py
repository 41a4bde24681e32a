"""Label assigners: from one-to-one matches of all stages to class targets of all stages.

Letters: S stages, B images, N queries, K classes. ``t`` is the stage whose targets are made, ``k``
the stage that a label comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..structures import Assignment, ClassTargets, GroundTruth

__all__ = ["LabelAssigner", "StagewiseMatcher"]


class LabelAssigner(nn.Module):
    """Decides whose matches give a query its labels.

    With g_k(q) the object that query q is matched to at stage k, and A_t(q) the stages that
    :meth:`sources` names, targets are multi-hot:

        T_t[q, c] = 1  iff  for some k in A_t(q): g_k(q) has class c.

    A subclass defines :meth:`sources`; what counts or draws labels asks it for their reasons.
    """

    name: str
    """Key of its numbers in files of metrics, such as "own_match"."""

    iou_threshold: float | None = None
    """Lowest IoU of a query's box with an object (inclusive) that a label of the object needs; None
    if it needs none."""

    one_label_per_match: bool = False
    """Whether the ones in the targets of a stage are as many as its matched queries, always."""

    def sources(self, assignment: Assignment, boxes: Tensor, truth: GroundTruth) -> Tensor:
        """Which stages' matches give each query its labels.

        Args:
            assignment: one-to-one matches of all stages.
            boxes: (S, B, N, 4) boxes of all stages, ``xyxy`` in pixels.
            truth: the objects.

        Returns:
            (S_t, B, N, S_k) bool: whether a query takes, at stage t, the label of the object that
            it is matched to at stage k. False where it is matched to none.
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(
        self, assignment: Assignment, boxes: Tensor, truth: GroundTruth, *, num_classes: int
    ) -> ClassTargets:
        """Targets from the labels of all sources.

        Args:
            assignment, boxes, truth: see :meth:`sources`.
            num_classes: K.
        """
        index = assignment.object_index.permute(1, 2, 0)  # (B, N, S_k)
        labels = truth.labels.gather(1, index.clamp(min=0).flatten(1)).view_as(index)
        takes = self.sources(assignment, boxes, truth)
        targets = boxes.new_zeros(*boxes.shape[:3], num_classes)
        targets.scatter_reduce_(
            3, labels.expand(len(boxes), -1, -1, -1), takes.to(targets.dtype), reduce="amax"
        )
        return ClassTargets(targets)


class StagewiseMatcher(LabelAssigner):
    """The baseline without cross-stage labels: T_t[q, class(g_t(q))] = 1, nothing else."""

    name = "own_match"
    one_label_per_match = True

    def sources(self, assignment: Assignment, boxes: Tensor, truth: GroundTruth) -> Tensor:
        """Each query's own match, whatever its box."""
        own = torch.eye(len(boxes), dtype=torch.bool, device=boxes.device)
        return assignment.matched.permute(1, 2, 0) & own[:, None, None]
