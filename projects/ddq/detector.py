"""The registered meta-architecture.

Letters: B images, N queries, C channels, S stages; of the N queries D restore noised objects, Q are
distinct, and M dense, in this order.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList

from detection_toolkit.structures import (
    Assignment,
    Branch,
    GroundTruth,
    Predictions,
    Queries,
)
from dino import DINO
from dino.detector import DENOISING, no_objects, only

from .decoder import DDQDecoder
from .queries import DistinctQueries

__all__ = ["DDQ", "DENSE"]

DENSE = "dense"
"""The branch of the dense queries."""


@META_ARCH_REGISTRY.register()
class DDQ(DINO):
    """DDQ-DETR (Zhang et al., CVPR 2023): dense distinct queries.

    What differs from DINO are queries and decoder, :class:`~ddq.DistinctQueries` and
    :class:`~ddq.DDQDecoder`, and that in training dense queries stand beside the distinct ones.
    """

    initial_queries: DistinctQueries
    decoder: DDQDecoder

    def __init__(self, **parts: Any):
        """
        Args:
            parts: as of :class:`~dino.DINO`.
        """
        super().__init__(**parts)
        # All heads are of one draw.
        first = self.decoder.stages.get_submodule("0.head").state_dict()
        for head in (self.initial_queries.head, self.initial_queries.dense_head):
            head.load_state_dict(first)

    def predict(self, images: ImageList, truth: GroundTruth | None = None) -> Predictions:
        """As :meth:`DINO.predict`; in training with the branch of the dense queries, and that of
        the proposals that they are chosen from."""
        if not self.training:
            return super().predict(images, truth)
        maps = self.extract_features(images)
        distinct, dense, branches = self.initial_queries.propose_all(maps)
        queries, object_index = distinct, None
        if self.denoising is not None:
            if truth is None:
                truth = no_objects(images, maps.image_sizes)
            queries, object_index = self.denoising(distinct, truth)
        queries = _beside(queries, dense, count=distinct.content.shape[1])
        kinds = queries.kinds
        assert kinds is not None
        outputs = self.decoder(maps, queries)
        # In a row: denoising, distinct, dense.
        ends = kinds[0], kinds[0] + kinds[1], None
        own, last = slice(*ends[:2]), slice(*ends[1:])
        if object_index is not None:
            denoised = [only(x, slice(ends[0])) for x in outputs]
            assignment = Assignment(object_index.expand(len(outputs), -1, -1))
            branches = (*branches, Branch(DENOISING, denoised, assignment))
        branches = (*branches, Branch(DENSE, [only(x, last) for x in outputs]))
        return Predictions([only(x, own) for x in outputs], branches)


def _beside(queries: Queries, dense: Queries, *, count: int) -> Queries:
    """The queries, of which the last ``count`` are distinct, and after them dense ones. The two see
    nothing of each other."""
    first, others = queries.content.shape[1], dense.content.shape[1]
    mask = torch.ones(
        first + others, first + others, dtype=torch.bool, device=queries.content.device
    )
    mask[:first, :first] = False if queries.attention_mask is None else queries.attention_mask
    mask[first:, first:] = False
    return Queries(
        torch.cat([queries.content, dense.content], dim=1),
        torch.cat([queries.geometry, dense.geometry], dim=1),
        attention_mask=mask,
        kinds=(first - count, count, others),
    )
