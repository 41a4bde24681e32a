"""The decoder: queries attend to one another, then to a few points around their references.

Letters: B images, R sets of queries that look at each image, N queries, C channels, S stages,
L levels, K classes, D numbers of a reference (see :mod:`.heads`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import (
    QUERY_HEADS,
    CascadeDecoder,
    Execution,
    FeatureMaps,
    Route,
)
from detection_toolkit.structures import Queries, StageOutput

from .attention import DeformableAttention, FeedForward, SelfAttention
from .heads import PredictionHead, boxes_in_pixels, move_reference

__all__ = [
    "DeformableDETRDecoder",
    "DeformableDecoder",
    "DeformableDecoderStage",
    "RefiningDeformableDETRDecoder",
    "keep_reference",
    "on_levels",
    "refining_heads",
    "take_box",
]


def keep_reference(reference: Tensor, box: Tensor) -> Tensor:
    """All stages look around the initial reference, and gradients of all reach it."""
    return reference


def take_box(reference: Tensor, box: Tensor) -> Tensor:
    """The next stage looks around the box of this one, through which no gradient goes."""
    return box.detach()


class DeformableDecoderStage(nn.Module):
    """Self-attention, deformable attention, feed-forward network and predictions."""

    def __init__(
        self,
        *,
        self_attention: SelfAttention,
        attention: DeformableAttention,
        ffn: FeedForward,
        head: PredictionHead,
        next_reference: Callable[[Tensor, Tensor], Tensor],
        dropout: float,
        eps: float = 1e-5,
    ):
        """
        Args:
            self_attention, attention, ffn: the parts.
            head: of this stage, or of all.
            next_reference: (reference, predicted box) -> reference of the next stage.
            dropout: of the deformable attention's output.
            eps: of :func:`~deformable_detr.heads.inverse_sigmoid`, of the references.
        """
        super().__init__()
        self.self_attention = self_attention
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(attention.output_proj.out_features)
        self.ffn = ffn
        self.head = head
        self.next_reference = next_reference
        self.eps = eps

    def forward(self, queries: Queries, maps: FeatureMaps, carry: Any) -> tuple[StageOutput, Any]:
        """
        Args:
            queries: content and position (R B, N, C), geometry (R B, N, D): their references.
            maps: the encoder's.
            carry: none; handed on.
        """
        content, reference = self.attend(queries, maps), queries.geometry
        logits, delta = self.head(content)
        # Under autocast, coordinates stay in the precision of the references.
        box = move_reference(reference, delta.to(reference.dtype), self.eps)
        moved = queries._replace(content=content, geometry=self.next_reference(reference, box))
        return StageOutput(logits, boxes_in_pixels(box, maps.image_sizes), moved), carry

    def attend(self, queries: Queries, maps: FeatureMaps) -> Tensor:
        """(R B, N, C) content of queries that have looked at one another and at the maps."""
        content, reference, position, mask, _ = queries
        content = self.self_attention(content, position, mask)
        places = on_levels(reference, maps)
        attended = self.attention(content + position, places, maps)
        return self.ffn(self.norm(content + self.dropout(attended)))


def on_levels(reference: Tensor, maps: FeatureMaps) -> Tensor:
    """References (R B, N, D) as shares of each padded map, (R B, N, L, D)."""
    ratios = maps.valid_ratios.to(reference)
    ratios = ratios.repeat_interleave(reference.shape[0] // ratios.shape[0], 0)[:, None]
    return reference[:, :, None] * ratios.repeat(1, 1, 1, reference.shape[-1] // 2)


class DeformableDecoder(CascadeDecoder):
    """What the decoders with deformable attention share; a method gives them heads."""

    def __init__(
        self,
        heads: Sequence[PredictionHead],
        next_reference: Callable[[Tensor, Tensor], Tensor],
        *,
        channels: int,
        num_levels: int,
        num_heads: int,
        num_points: int,
        ffn_channels: int,
        dropout: float,
        eps: float = 1e-5,
        execution: Execution | None,
        route: Route | None,
    ):
        """
        Args:
            heads: of the S stages; one may be that of several.
            next_reference, dropout, eps: see :class:`DeformableDecoderStage`.
            channels, num_levels, num_heads, num_points, ffn_channels, execution, route: see
                :class:`DeformableDETRDecoder`.
        """
        super().__init__(
            [
                DeformableDecoderStage(
                    self_attention=SelfAttention(channels, num_heads, dropout),
                    attention=DeformableAttention(
                        channels,
                        num_heads=num_heads,
                        num_levels=num_levels,
                        num_points=num_points,
                        execution=execution,
                    ),
                    ffn=FeedForward(channels, ffn_channels, dropout),
                    head=head,
                    next_reference=next_reference,
                    dropout=dropout,
                    eps=eps,
                )
                for head in heads
            ],
            execution=execution,
            route=route,
        )

    def _lay_out(self, maps: FeatureMaps, queries: Queries) -> FeatureMaps:
        # Each stage samples a projection of its own, which it lays out itself.
        return maps


@QUERY_HEADS.register()
class DeformableDETRDecoder(DeformableDecoder):
    """Stages that share one prediction head, and the initial references; the defaults are
    released."""

    def __init__(
        self,
        num_classes: int,
        *,
        num_stages: int = 6,
        channels: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_channels: int = 1024,
        dropout: float = 0.1,
        execution: Execution | None = None,
        route: Route | None = None,
    ):
        """
        Args:
            num_classes: K.
            num_stages: S.
            channels: C.
            num_levels: L.
            num_heads, num_points: of the attention.
            ffn_channels: hidden width of the FFN.
            dropout: of attention and FFN.
            execution, route: see :class:`~detection_toolkit.modeling.CascadeDecoder`.

        Raises:
            UserError: no stage.
        """
        super().__init__(
            [PredictionHead(channels, num_classes)] * _at_least_one(num_stages),
            keep_reference,
            channels=channels,
            num_levels=num_levels,
            num_heads=num_heads,
            num_points=num_points,
            ffn_channels=ffn_channels,
            dropout=dropout,
            execution=execution,
            route=route,
        )


@QUERY_HEADS.register()
class RefiningDeformableDETRDecoder(DeformableDecoder):
    """Stages with heads of their own, each of which refines the box of the one before (paper,
    section 4.3); the defaults are released."""

    def __init__(
        self,
        num_classes: int,
        *,
        num_stages: int = 6,
        channels: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_channels: int = 1024,
        dropout: float = 0.1,
        first_size_logit: float = -2.0,
        execution: Execution | None = None,
        route: Route | None = None,
    ):
        """
        Args:
            first_size_logit: what width and height of the first stage's boxes start from; 0 where
                the initial references are boxes already.
            num_classes, num_stages, channels, num_levels, num_heads, num_points, ffn_channels,
                dropout, execution, route: as for :class:`DeformableDETRDecoder`.

        Raises:
            UserError: no stage.
        """
        super().__init__(
            refining_heads(num_stages, channels, num_classes, first_size_logit=first_size_logit),
            take_box,
            channels=channels,
            num_levels=num_levels,
            num_heads=num_heads,
            num_points=num_points,
            ffn_channels=ffn_channels,
            dropout=dropout,
            execution=execution,
            route=route,
        )


def refining_heads(
    num_stages: int, channels: int, num_classes: int, *, first_size_logit: float
) -> list[PredictionHead]:
    """Heads of S stages that start alike, but for the size of the first stage's boxes.

    Raises:
        UserError: no stage.
    """
    first = PredictionHead(channels, num_classes, size_logit=first_size_logit)
    heads = [first, *(copy.deepcopy(first) for _ in range(_at_least_one(num_stages) - 1))]
    for head in heads[1:]:
        nn.init.zeros_(head.box[-1].bias)
    return heads


def _at_least_one(num_stages: int) -> int:
    if num_stages < 1:
        raise UserError(f"num_stages must be at least 1, got {num_stages}")
    return num_stages
