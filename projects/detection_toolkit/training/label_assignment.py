"""Label assigners that belong to no paper.

Letters: S stages, B images, N queries, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..structures import Assignment, ClassTargets, GroundTruth

__all__ = ["StagewiseMatcher"]


class StagewiseMatcher(nn.Module):
    """The baseline without cross-stage labels: T_t[q, class(g_t(q))] = 1, nothing else."""

    @torch.no_grad()
    def forward(
        self, assignment: Assignment, boxes: Tensor, truth: GroundTruth, *, num_classes: int
    ) -> ClassTargets:
        """Targets from each query's own match.

        Args:
            assignment: one-to-one matches of all stages.
            boxes: (S, B, N, 4) boxes of all stages, ``xyxy`` in pixels.
            truth: the objects.
            num_classes: K.
        """
        num_stages, num_images, num_queries, _ = boxes.shape
        index = assignment.object_index.clamp(min=0).permute(1, 0, 2).flatten(1)
        labels = truth.labels.gather(1, index).view(num_images, num_stages, num_queries)
        targets = boxes.new_zeros(num_stages, num_images, num_queries, num_classes)
        matched = assignment.matched.to(targets.dtype)
        targets.scatter_(3, labels.transpose(0, 1)[..., None], matched[..., None])
        return ClassTargets(targets)
