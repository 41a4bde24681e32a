"""Cross-stage label assignment (paper, section on the cross-stage label assigner, Fig. 5).

Letters: S stages, B images, N queries, M objects. ``t`` is the stage whose targets
are made, ``k`` the stage that a label comes from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detection_toolkit.errors import UserError
from detection_toolkit.structures import Assignment, GroundTruth, box_iou
from detection_toolkit.training import LabelAssigner

__all__ = ["CrossStageMatcher"]


class CrossStageMatcher(LabelAssigner):
    r"""Gathers the labels of several stages and reallocates them query by query.

    Let g_k(q) be the object that query q is matched to at stage k. Stage t listens to a set A(t)
    of stages, and its targets are multi-hot:

        T_t[q, c] = 1  iff  for some k in A(t): g_k(q) exists, has class c,
                            and IoU(box_t(q), g_k(q)) >= iou_threshold.

    So a query gains the label of an object that its box covers already although another stage
    matched it, and loses the label of its own match while its box does not reach the threshold.
    """

    name = "cross_stage"
    iou_threshold: float

    def __init__(
        self,
        iou_threshold: float = 0.5,
        *,
        stage_offsets: Sequence[Sequence[int]] | None = None,
        keep_own: bool = False,
    ):
        """
        Args:
            iou_threshold: lowest IoU (inclusive) at which a query takes a gathered label.
            stage_offsets: for each stage t the offsets k - t of the *other* stages that it
                listens to; offsets that lead outside the decoder are ignored. By default the
                released scope, A(t) = {t - 1, t, t + 1, ..., S - 1}.
            keep_own: a query keeps the label of its own match whatever its box, so that labels are
                only added. Neither the paper nor the released code does so.
        """
        super().__init__()
        if not 0.0 <= iou_threshold <= 1.0:
            raise UserError(f"iou_threshold must lie in [0, 1], got {iou_threshold}")
        self.iou_threshold = iou_threshold
        self.stage_offsets = stage_offsets
        self.keep_own = keep_own

    def listens_to(self, num_stages: int) -> Tensor:
        """(S, S) bool: entry (t, k) says whether stage t listens to stage k.

        Raises:
            ValueError: ``stage_offsets`` was given for another number of stages.
        """
        if self.stage_offsets is None:
            return torch.ones(num_stages, num_stages, dtype=torch.bool).triu(-1)
        if len(self.stage_offsets) != num_stages:
            raise UserError(
                f"stage_offsets has {len(self.stage_offsets)} entries, "
                f"but the decoder has {num_stages} stages"
            )
        scope = torch.eye(num_stages, dtype=torch.bool)
        for t, offsets in enumerate(self.stage_offsets):
            for offset in offsets:
                if 0 <= t + offset < num_stages:
                    scope[t, t + offset] = True
        return scope

    def sources(self, assignment: Assignment, boxes: Tensor, truth: GroundTruth) -> Tensor:
        """(S_t, B, N, S_k): stages in the scope whose object the query's box covers at stage t."""
        num_stages, num_images, num_queries, _ = boxes.shape
        source = assignment.object_index.permute(1, 2, 0)  # (B, N, S_k)
        # The boxes of all objects that a query was given anywhere: (B, N, S_k, 4).
        flat = source.clamp(min=0).flatten(1)
        objects = truth.boxes.gather(1, flat[..., None].expand(-1, -1, 4))
        objects = objects.view(num_images, num_queries, num_stages, 4)

        iou = box_iou(boxes[:, :, :, None], objects)  # (S_t, B, N, S_k)
        scope = self.listens_to(num_stages).to(boxes.device, non_blocking=True)
        covers = iou >= self.iou_threshold
        if self.keep_own:
            covers |= torch.eye(num_stages, dtype=torch.bool, device=iou.device)[:, None, None, :]
        return covers & (source >= 0) & scope[:, None, None, :]
