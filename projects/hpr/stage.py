"""The hybrid layer: three refiners that start from the same queries (paper, section 3.2).

Letters: B images, R sets of queries that look at each image, N queries, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from deformable_detr.attention import FeedForward, SelfAttention
from deformable_detr.decoder import DeformableDecoderStage, on_levels
from deformable_detr.heads import boxes_in_pixels
from detection_toolkit.modeling import FeatureMaps
from detection_toolkit.structures import Queries

from .merge import Merge
from .roi import RoIFeatures

__all__ = ["HybridStage", "Refiner"]


class Refiner(nn.Module):
    """A layer whose own module refines queries by the features of their regions.

    Its parts are those of a plain layer: self-attention, the module, a feed-forward network, each
    with a residual and a norm.
    """

    def __init__(self, module: nn.Module, self_attention: SelfAttention, ffn: FeedForward):
        """
        Args:
            module: contents (n, C) and features of regions (n, cells, C) -> (n, C).
            self_attention, ffn: its own.
        """
        super().__init__()
        self.self_attention = self_attention
        self.look = module
        self.norm = nn.LayerNorm(ffn.norm.normalized_shape)
        self.ffn = ffn

    def forward(self, attended: Tensor, regions: Tensor) -> Tensor:
        """
        Args:
            attended: (R B, N, C) the sum that ``self_attention.before_norm`` returns.
            regions: (R B, N, cells, C).

        Returns:
            (R B, N, C), without the norm of the feed-forward network.
        """
        content = self.self_attention.norm(attended)
        found = self.look(content.flatten(0, 1), regions.flatten(0, 1))
        content = self.norm(content + found.view_as(content))
        return self.ffn.before_norm(content)


class HybridStage(DeformableDecoderStage):
    """A plain stage as the primary refiner, and auxiliary ones that add to it at two places.

    All start from the same queries. What is added are the sums before a norm: after self-attention,
    and after the feed-forward networks. Only the primary queries go on.
    """

    def __init__(
        self,
        primary: DeformableDecoderStage,
        auxiliary: Mapping[str, Refiner],
        *,
        merge: Callable[[], Merge],
        roi_features: RoIFeatures,
    ):
        """
        Args:
            primary: whose parts become those of this stage.
            auxiliary: further refiners by their names, in the order of their weights.
            merge: makes what adds them to the primary one.
            roi_features: of the boxes that the stage starts from, for all auxiliary refiners.
        """
        super().__init__(
            self_attention=primary.self_attention,
            attention=primary.attention,
            ffn=primary.ffn,
            head=primary.head,
            next_reference=primary.next_reference,
            dropout=primary.dropout.p,
            eps=primary.eps,
        )
        self.auxiliary = nn.ModuleDict(auxiliary)
        self.merge_attended = merge()
        self.merge_refined = merge()
        self.roi_features: nn.Module = roi_features

    def attend(self, queries: Queries, maps: FeatureMaps) -> Tensor:
        """As :meth:`DeformableDecoderStage.attend`."""
        return self.refine(queries, maps)[0]

    def refine(self, queries: Queries, maps: FeatureMaps) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            queries: content and position (R B, N, C), geometry (R B, N, 4): centre and size as
                shares of the image.
            maps: the encoder's.

        Returns:
            contents (R B, N, C), and what each auxiliary refiner has found, (R B, N, C) likewise,
            before its last norm.
        """
        content, reference, position, mask, _ = queries
        regions = self.roi_features(boxes_in_pixels(reference, maps.image_sizes).detach(), maps)
        refiners = self.auxiliary.values()
        attended = [
            attention.before_norm(content, position, mask)
            for attention in (self.self_attention, *(x.self_attention for x in refiners))
        ]
        content = self.self_attention.norm(self.merge_attended(attended))
        sampled = self.attention(content + position, on_levels(reference, maps), maps)
        content = self.norm(content + self.dropout(sampled))
        refined = [
            self.ffn.before_norm(content),
            *(refiner(x, regions) for refiner, x in zip(refiners, attended[1:])),
        ]
        content = self.ffn.norm(self.merge_refined(refined))
        return content, dict(zip(self.auxiliary, refined[1:]))
