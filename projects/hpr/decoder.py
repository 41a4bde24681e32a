"""The refiner stack: DINO's decoder with hybrid stages, and heads of the auxiliary refiners.

Letters: B images, R sets of queries that look at each image, N queries, C channels, S stages,
K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from deformable_detr.attention import FeedForward, SelfAttention
from deformable_detr.decoder import refining_heads
from deformable_detr.heads import boxes_in_pixels
from detection_toolkit.errors import UnknownNameError
from detection_toolkit.modeling import QUERY_HEADS, Execution, FeatureMaps
from detection_toolkit.structures import Queries
from dino import DINODecoder

from .dynamic_convolution import DynamicConvolution
from .merge import MERGES
from .regional_attention import RegionalCrossAttention
from .roi import RoIFeatures, flat_maps
from .stage import HybridStage, Refiner

__all__ = ["DYNAMIC", "REGIONAL", "HybridDecoder", "SingleRefinerDecoder"]

DYNAMIC = "dynamic"
"""The refiner with dynamic convolution, and the branch of its head."""
REGIONAL = "regional"
"""That with regional cross-attention."""


@QUERY_HEADS.register()
class HybridDecoder(DINODecoder):
    """DINO's decoder, each stage with two more refiners.

    In training each auxiliary refiner has a norm for all stages, and a head for each, which
    predicts beside the references of the primary one. With merge weights (1, 0, 0) it is DINO's.

    It goes with any decoder made of DINO's: ``class HybridX(HybridDecoder, XDecoder)``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        num_stages: int = 6,
        channels: int = 256,
        num_heads: int = 8,
        ffn_channels: int = 2048,
        dropout: float = 0.0,
        merge: str = "channel",
        merge_start: Sequence[float] | None = (1.0, 1.0, 1.0),
        inner_channels: int = 64,
        num_samples: int = 5,
        finest_scale: float = 56.0,
        roi_strides: Sequence[int] | None = None,
        prediction_eps: float = 1e-5,
        **others: Any,
    ):
        """
        Args:
            merge: ``channel``, ``scalar`` or ``fixed`` weights, see :mod:`.merge`.
            merge_start: of the primary refiner, dynamic convolution and regional cross-attention;
                None: drawn (``channel``).
            inner_channels: of dynamic convolution.
            num_samples: of a query in regional cross-attention.
            finest_scale, roi_strides: see :class:`RoIFeatures`.
            num_classes, num_stages, channels, num_heads, ffn_channels, dropout, prediction_eps,
                others: as of :class:`~dino.DINODecoder`.

        Raises:
            UnknownNameError: no such merge.
            UserError: no stage, or weights for another number of refiners.
        """
        super().__init__(
            num_classes,
            num_stages=num_stages,
            channels=channels,
            num_heads=num_heads,
            ffn_channels=ffn_channels,
            dropout=dropout,
            prediction_eps=prediction_eps,
            **others,
        )
        if merge not in MERGES:
            raise UnknownNameError(
                f"model.decoder.merge={merge!r} is not one of {', '.join(map(repr, MERGES))}"
            )

        refiner = partial(
            make_refiner,
            channels=channels,
            num_heads=num_heads,
            ffn_channels=ffn_channels,
            dropout=dropout,
            inner_channels=inner_channels,
            num_samples=num_samples,
            execution=self.execution,
        )
        self.stages = nn.ModuleList(
            HybridStage(
                primary,
                {name: refiner(name) for name in (DYNAMIC, REGIONAL)},
                merge=partial(MERGES[merge], merge_start, channels, 3),
                roi_features=RoIFeatures(
                    finest_scale=finest_scale, strides=roi_strides, execution=self.execution
                ),
            )
            for primary in self.stages
        )
        self.auxiliary_norms = nn.ModuleDict(
            {name: nn.LayerNorm(channels) for name in (REGIONAL, DYNAMIC)}
        )
        self.auxiliary_heads = nn.ModuleDict(
            {name: nn.ModuleList(self.make_heads(num_classes)) for name in self.auxiliary_norms}
        )

    def make_heads(self, num_classes: int) -> Sequence[nn.Module]:
        """S heads of an auxiliary refiner, which start alike."""
        channels = self.norm.normalized_shape[0]
        return refining_heads(self.num_stages, channels, num_classes, first_size_logit=0.0)

    def attend(
        self, index: int, queries: Queries, maps: FeatureMaps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`DINODecoder.attend`, with features of both auxiliary refiners."""
        stage = self.stages[index]
        assert isinstance(stage, HybridStage)
        content, found = stage.refine(queries, maps)
        if not (self.training or self.predicts_auxiliary):
            return content, {}
        features = {}
        for name, norm in self.auxiliary_norms.items():
            refiner = stage.auxiliary[name]
            assert isinstance(refiner, Refiner)
            features[name] = norm(refiner.ffn.norm(found[name]))
        return content, features

    @property
    def auxiliary_names(self) -> tuple[str, ...]:
        return tuple(self.auxiliary_norms)

    def auxiliary_head(self, name: str, index: int, queries: Queries) -> Any:
        return self.auxiliary_heads.get_submodule(f"{name}.{index}")

    def _lay_out(self, maps: FeatureMaps, queries: Queries) -> FeatureMaps:
        maps = super()._lay_out(maps, queries)
        plain = self.execution.sampling == "grid"
        return maps if plain else flat_maps(maps, queries.geometry.dtype)


def make_refiner(
    name: str,
    *,
    channels: int,
    num_heads: int,
    ffn_channels: int,
    dropout: float,
    inner_channels: int,
    num_samples: int,
    execution: Execution,
) -> Refiner:
    """An auxiliary refiner; arguments as of :class:`HybridDecoder`.

    Raises:
        UnknownNameError: none has this name.
    """
    look: nn.Module
    if name == DYNAMIC:
        look = DynamicConvolution(channels, inner_channels=inner_channels)
    elif name == REGIONAL:
        look = RegionalCrossAttention(
            channels, num_heads=num_heads, num_samples=num_samples, execution=execution
        )
    else:
        raise UnknownNameError(f"model.decoder.refiner={name!r} is not {DYNAMIC} or {REGIONAL}")
    return Refiner(
        look,
        SelfAttention(channels, num_heads, dropout),
        FeedForward(channels, ffn_channels, dropout),
    )


class RefinerStage(nn.Module):
    """A layer with one refiner of regions, in the place of deformable attention."""

    def __init__(self, refiner: Refiner, head: nn.Module, roi_features: RoIFeatures):
        super().__init__()
        self.refiner = refiner
        self.head = head
        self.roi_features = roi_features

    def attend(self, queries: Queries, maps: FeatureMaps) -> Tensor:
        """(R B, N, C) content of queries that have looked at one another and at their regions."""
        boxes = boxes_in_pixels(queries.geometry, maps.image_sizes)
        attended = self.refiner.self_attention.before_norm(
            queries.content, queries.position, queries.attention_mask
        )
        return self.refiner.ffn.norm(self.refiner(attended, self.roi_features(boxes, maps)))


@QUERY_HEADS.register()
class SingleRefinerDecoder(DINODecoder):
    """DINO's decoder with another refiner alone in the place of deformable attention, as the paper
    compares them."""

    def __init__(
        self,
        num_classes: int,
        *,
        refiner: str,
        channels: int = 256,
        num_heads: int = 8,
        ffn_channels: int = 2048,
        dropout: float = 0.0,
        inner_channels: int = 64,
        num_samples: int = 5,
        finest_scale: float = 56.0,
        **others: Any,
    ):
        """
        Args:
            refiner: ``dynamic`` or ``regional``.
            inner_channels, num_samples, finest_scale: as of :class:`HybridDecoder`.
            num_classes, channels, num_heads, ffn_channels, dropout, others: as of
                :class:`~dino.DINODecoder`.

        Raises:
            UnknownNameError: no such refiner.
            UserError: no stage.
        """
        super().__init__(
            num_classes,
            channels=channels,
            num_heads=num_heads,
            ffn_channels=ffn_channels,
            dropout=dropout,
            **others,
        )
        self.stages = nn.ModuleList(
            RefinerStage(
                make_refiner(
                    refiner,
                    channels=channels,
                    num_heads=num_heads,
                    ffn_channels=ffn_channels,
                    dropout=dropout,
                    inner_channels=inner_channels,
                    num_samples=num_samples,
                    execution=self.execution,
                ),
                stage.get_submodule("head"),
                RoIFeatures(finest_scale=finest_scale, execution=self.execution),
            )
            for stage in self.stages
        )
