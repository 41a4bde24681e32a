"""Where the queries come from.

Letters: B images, N queries, M dense queries, C channels, K classes, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from deformable_detr.heads import PredictionHead, boxes_in_pixels
from deformable_detr.positions import to_tokens
from deformable_detr.queries import EncoderProposals
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import FeatureMaps
from detection_toolkit.structures import Branch, HeadOutput, Queries
from dino.queries import rows

from .selection import first_distinct

__all__ = ["DENSE_ENCODER", "DistinctQueries"]

DENSE_ENCODER = "dense_encoder"
"""The branch of the proposals that dense queries are chosen from."""


class DistinctQueries(EncoderProposals):
    """Boxes of the encoder and contents of its cells, of proposals that are not alike.

    Non-maximum suppression, whatever the class, leaves the best of all proposals. In training there
    are dense queries besides, which a head of its own chooses, alike or not; they are to have many
    queries for each object.
    """

    def __init__(
        self,
        num_queries: int,
        channels: int,
        num_classes: int,
        *,
        dense_ratio: float = 1.5,
        iou_threshold: float = 0.8,
    ):
        """
        Args:
            num_queries: N.
            channels: C.
            num_classes: K.
            dense_ratio: M / N.
            iou_threshold: of two proposals that overlap by more, the better one stays.

        Raises:
            UserError: no dense query, or no IoU.
        """
        super().__init__(num_queries, channels, num_classes)
        self.num_dense = int(dense_ratio * num_queries)
        if self.num_dense < 1:
            raise UserError(
                f"model.initial_queries.dense_ratio={dense_ratio} gives no dense query: DDQ is "
                "trained with some"
            )
        check_iou(iou_threshold, "model.initial_queries.iou_threshold")
        self.iou_threshold = iou_threshold
        self.content = nn.Linear(channels, channels)
        self.dense_head = PredictionHead(channels, num_classes, size_logit=0.0)

    def propose(self, maps: FeatureMaps) -> tuple[Queries, tuple[Branch, ...]]:
        """Boxes (B, N, 4), and the branch of the chosen proposals.

        Where fewer than N are distinct, the queries at the end are empty: a content of zeros, the
        box in the middle of the image, every class as likely as not.

        Raises:
            UserError: more queries than cells.
        """
        return self._distinct(maps, *self.encode(maps))

    def propose_all(self, maps: FeatureMaps) -> tuple[Queries, Queries, tuple[Branch, ...]]:
        """The distinct queries, the dense ones, and the branches of both.

        Raises:
            UserError: more queries than cells.
        """
        code, proposals = self.encode(maps)
        queries, branches = self._distinct(maps, code, proposals)
        logits, box_logits = self.judge(self.dense_head, code, proposals)
        count = min(self.num_dense, logits.shape[1])
        index = logits.amax(-1).topk(count, dim=1).indices[..., None]
        dense, branch = self._take(maps, index, DENSE_ENCODER, logits, box_logits)
        return queries, dense, (*branches, branch)

    def _distinct(
        self, maps: FeatureMaps, code: Tensor, proposals: Tensor
    ) -> tuple[Queries, tuple[Branch, ...]]:
        logits, box_logits = self.judge(self.head, code, proposals)
        self.check_count(logits.shape[1])
        boxes = box_convert(box_logits.detach().sigmoid(), "cxcywh", "xyxy")
        scores = logits.detach().amax(-1).sigmoid()
        index, filled = first_distinct(boxes, scores, self.iou_threshold, self.num_queries)
        queries, branch = self._take(
            maps, index[..., None], self.branch, logits, box_logits, filled[..., None]
        )
        return queries, (branch,)

    def _take(
        self,
        maps: FeatureMaps,
        index: Tensor,
        name: str,
        logits: Tensor,
        box_logits: Tensor,
        filled: Tensor | None = None,
    ) -> tuple[Queries, Branch]:
        """Queries and the branch of the proposals (B, N, 1), of which some may be empty."""
        logits, box_logits = rows(logits, index), rows(box_logits, index)
        content = self.content(rows(to_tokens(maps.levels).detach(), index))
        if filled is not None:
            logits, box_logits, content = (
                torch.where(filled, x, 0.0) for x in (logits, box_logits, content)
            )
        boxes = box_logits.sigmoid()
        chosen = HeadOutput(logits, boxes_in_pixels(boxes, maps.image_sizes))
        return Queries(content, boxes.detach()), Branch(name, [chosen])


def check_iou(value: float, key: str) -> None:
    """
    Raises:
        UserError: the value is no IoU.
    """
    if not 0 < value <= 1:
        raise UserError(f"{key} must lie in (0, 1], got {value}")
