"""The decoder: DINO's, which looks after every stage which queries are still distinct.

Letters: B images, N queries, C channels, S stages, K classes; of the N queries D restore noised
objects, Q are distinct, and M dense, in this order.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import QUERY_HEADS, Execution, FeatureMaps
from detection_toolkit.structures import Queries, StageOutput
from dino import DINODecoder

from .queries import check_iou
from .selection import distinct

__all__ = ["DDQDecoder", "DistinctSelection", "HeadsByKind", "kinds_of"]


class DistinctSelection(nn.Module):
    """After a stage, tells which queries a better one covers, and who may look at whom then.

    Query i may look at query j where i or j is distinct. Those that the next stage supervises, and
    that are detections, are the distinct ones; or all of the image as long as its first query,
    which is the best proposal, is distinct: the released code asks the first row of the mask, in
    which query 0 then sees everyone.
    """

    def __init__(self, iou_threshold: float = 0.8, *, first_keeps_all: bool = True):
        """
        Args:
            iou_threshold: of two queries whose boxes overlap by more, the better one stays.
            first_keeps_all: as in the released code; False: the distinct ones alone stay active,
                as in the paper.

        Raises:
            UserError: no IoU.
        """
        super().__init__()
        check_iou(iou_threshold, "model.decoder.iou_threshold")
        self.iou_threshold = iou_threshold
        self.first_keeps_all = first_keeps_all

    def survivors(self, boxes: Tensor, scores: Tensor, active: Tensor | None) -> Tensor:
        """(B, Q) bool: the distinct ones of the active.

        Args:
            boxes: (B, Q, 4) centre and size as shares of the image.
            scores: (B, Q).
            active: (B, Q) bool; None: all.
        """
        return distinct(
            box_convert(boxes, "cxcywh", "xyxy"), scores, self.iou_threshold, candidates=active
        )

    def active(self, survivors: Tensor) -> Tensor:
        """(B, Q) bool: the queries that stay active."""
        return survivors | survivors[:, :1] if self.first_keeps_all else survivors

    @staticmethod
    def mask(survivors: Tensor, queries: Queries) -> Tensor:
        """(B, N, N) bool: the mask of the queries, with the distinct ones told apart from the
        others among the Q."""
        apart = ~(survivors[:, :, None] | survivors[:, None])
        denoising, count, dense = kinds_of(queries)
        if not denoising + dense:
            return apart
        assert queries.attention_mask is not None
        mask = queries.attention_mask.expand(len(survivors), -1, -1).clone()
        end = denoising + count
        mask[:, denoising:end, denoising:end] = apart
        return mask

    @torch.no_grad()
    def forward(
        self, queries: Queries, scores: Tensor, active: Tensor | None
    ) -> tuple[Queries, Tensor]:
        """
        Args:
            queries: after the stage, with refined boxes.
            scores: (B, Q) of the distinct queries.
            active: (B, Q) of the stages before; None: all.

        Returns:
            the queries with the next mask, and (B, Q) who is active in the next stage.
        """
        denoising, count, _ = kinds_of(queries)
        boxes = queries.geometry[:, denoising : denoising + count].detach()
        survivors = self.survivors(boxes, scores, active)
        mask = self.mask(survivors, queries)
        return queries._replace(attention_mask=mask), self.active(survivors)


def kinds_of(queries: Queries) -> tuple[int, int, int]:
    """(D, Q, M): how many queries of each kind there are."""
    if queries.kinds is None:
        return 0, queries.content.shape[1], 0
    denoising, count, dense = queries.kinds
    return denoising, count, dense


class HeadsByKind:
    """Predicts as a :class:`~deformable_detr.heads.PredictionHead` does: by one of the first
    queries, and by another of the M dense ones."""

    def __init__(self, head: Any, dense_head: Any, num_dense: int):
        self.head = head
        self.dense_head = dense_head
        self.num_dense = num_dense

    def classes(self, content: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, K)."""
        return self._joined(self.head.classes, self.dense_head.classes, content)

    def box(self, content: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 4)."""
        return self._joined(self.head.box, self.dense_head.box, content)

    def __call__(self, content: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(content), self.box(content)

    def _joined(self, first: nn.Module, second: nn.Module, content: Tensor) -> Tensor:
        if not self.num_dense:
            return first(content)
        count = content.shape[1] - self.num_dense
        return torch.cat([first(content[:, :count]), second(content[:, count:])], dim=1)


@QUERY_HEADS.register()
class DDQDecoder(DINODecoder):
    """DINO's decoder with a head for each stage, another for the dense queries of the stage, and a
    choice of distinct queries between the stages (paper, section 3.3)."""

    def __init__(
        self,
        num_classes: int,
        *,
        num_stages: int = 6,
        channels: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_channels: int = 2048,
        dropout: float = 0.0,
        prediction_eps: float = 1e-5,
        iou_threshold: float = 0.8,
        first_keeps_all: bool = True,
        execution: Execution | None = None,
    ):
        """
        Args:
            iou_threshold, first_keeps_all: see :class:`DistinctSelection`.
            num_classes, num_stages, channels, num_levels, num_heads, num_points, ffn_channels,
                dropout, prediction_eps, execution: see :class:`~dino.DINODecoder`.

        Raises:
            UserError: no stage, or an execution that records what it computes.
        """
        super().__init__(
            num_classes,
            num_stages=num_stages,
            channels=channels,
            num_levels=num_levels,
            num_heads=num_heads,
            num_points=num_points,
            ffn_channels=ffn_channels,
            dropout=dropout,
            prediction_eps=prediction_eps,
            execution=execution,
        )
        check_execution(self.execution)
        heads = (stage.get_submodule("head") for stage in self.stages)
        self.dense_heads = nn.ModuleList(copy.deepcopy(head) for head in heads)
        self.selection = DistinctSelection(iou_threshold, first_keeps_all=first_keeps_all)

    def pass_stage(
        self, index: int, queries: Queries, maps: FeatureMaps, carry: Any
    ) -> tuple[StageOutput, Any]:
        """Run one stage, refine, predict, and choose.

        Args:
            carry: (B, Q) bool: the active queries; None for all.
        """
        output, _ = super().pass_stage(index, queries, maps, None)
        moved, active = output.queries, among_all(carry, queries)
        if index + 1 < self.num_stages_run:
            denoising, count, _ = kinds_of(queries)
            own = moved.content[:, denoising : denoising + count].detach()
            head: Any = self.stages[index].head
            scores = head.classes(own).amax(-1).sigmoid()
            moved, carry = self.selection(moved, scores, carry)
        auxiliary = output.auxiliary and {
            name: x._replace(active=active) for name, x in output.auxiliary.items()
        }
        return output._replace(queries=moved, auxiliary=auxiliary, active=active), carry

    def main_head(self, index: int, queries: Queries) -> Any:
        head, dense_head = self.stages[index].head, self.dense_heads[index]
        return HeadsByKind(head, dense_head, kinds_of(queries)[2])


def among_all(active: Tensor | None, queries: Queries) -> Tensor | None:
    """(B, N) bool of (B, Q): queries of other kinds are active."""
    denoising, _, dense = kinds_of(queries)
    if active is None or not denoising + dense:
        return active
    sides = [active.new_ones(len(active), count) for count in (denoising, dense)]
    return torch.cat([sides[0], active, sides[1]], dim=1)


def check_execution(execution: Execution) -> None:
    """
    Raises:
        UserError: it records what is computed, which here depends on the predictions.
    """
    for name, none in (("compile", '""'), ("cuda_graphs", "false")):
        if getattr(execution, name):
            raise UserError(
                "which queries are distinct depends on what is predicted, so that nothing can be "
                f"recorded: set model.execution.{name}={none}"
            )
