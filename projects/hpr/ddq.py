"""HPR on DDQ: hybrid stages, between which distinct queries are chosen.

Letters: B images, N queries, S stages, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ddq import DDQ, DDQCriterion, DDQDecoder, DenseCriterion
from ddq.decoder import HeadsByKind, kinds_of
from ddq.queries import DENSE_ENCODER
from deformable_detr.queries import EncoderProposals
from detection_toolkit.modeling import QUERY_HEADS
from detection_toolkit.structures import Queries
from detection_toolkit.training import Criterion

from .criterion import auxiliary_criteria
from .decoder import HybridDecoder
from .detector import HPR

__all__ = ["HPRDDQ", "HybridDDQCriterion", "HybridDDQDecoder"]


@QUERY_HEADS.register()
class HybridDDQDecoder(HybridDecoder, DDQDecoder):
    """DDQ's decoder with hybrid stages. Auxiliary heads have one more for dense queries, too, and
    the choice of distinct queries counts for all heads."""

    def __init__(self, num_classes: int, **options: Any):
        """
        Args:
            num_classes: K.
            options: as of :class:`~hpr.HybridDecoder` and :class:`~ddq.DDQDecoder`.
        """
        super().__init__(num_classes, **options)
        # All heads are of one draw.
        first = self.stages.get_submodule("0.head").state_dict()
        for heads in self.auxiliary_heads.values():
            for head in heads.children():
                head.load_state_dict(first)
        self.auxiliary_dense_heads: nn.ModuleDict = copy.deepcopy(self.auxiliary_heads)

    def auxiliary_head(self, name: str, index: int, queries: Queries) -> Any:
        head, dense_head = (
            heads.get_submodule(f"{name}.{index}")
            for heads in (self.auxiliary_heads, self.auxiliary_dense_heads)
        )
        return HeadsByKind(head, dense_head, kinds_of(queries)[2])


@META_ARCH_REGISTRY.register()
class HPRDDQ(HPR, DDQ):
    """Hybrid Proposal Refiner on DDQ. The flow is DDQ's; the auxiliary heads are supervised."""


class HybridDDQCriterion(DDQCriterion):
    """Losses of DDQ, and the same of each auxiliary head, but for the proposals."""

    def __init__(
        self,
        main: Criterion,
        *,
        encoder: Criterion,
        dense: DenseCriterion,
        dense_encoder: DenseCriterion,
        denoising: Criterion | None = None,
        auxiliary: Mapping[str, float] | None = None,
    ):
        """
        Args:
            main, encoder, dense, dense_encoder, denoising: see :class:`~ddq.DDQCriterion`.
            auxiliary: see :class:`~hpr.HybridCriterion`.
        """
        super().__init__(
            main, encoder=encoder, dense=dense, dense_encoder=dense_encoder, denoising=denoising
        )
        without = (EncoderProposals.branch, DENSE_ENCODER)
        self.branches.update(auxiliary_criteria(self, auxiliary, without=without))
