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
from detection_toolkit.errors import UnknownNameError
from detection_toolkit.modeling import QUERY_HEADS, FeatureMaps
from detection_toolkit.structures import Queries
from dino import DINODecoder

from .dynamic_convolution import DynamicConvolution
from .merge import MERGES
from .regional_attention import RegionalCrossAttention
from .roi import RoIFeatures, flat_maps
from .stage import HybridStage, Refiner

__all__ = ["DYNAMIC", "REGIONAL", "HybridDecoder"]

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

        def refiner(module: nn.Module) -> Refiner:
            return Refiner(
                module,
                SelfAttention(channels, num_heads, dropout),
                FeedForward(channels, ffn_channels, dropout),
            )

        roi_features = partial(
            RoIFeatures, finest_scale=finest_scale, strides=roi_strides, execution=self.execution
        )
        self.stages = nn.ModuleList(
            HybridStage(
                primary,
                {
                    DYNAMIC: refiner(DynamicConvolution(channels, inner_channels=inner_channels)),
                    REGIONAL: refiner(
                        RegionalCrossAttention(
                            channels,
                            num_heads=num_heads,
                            num_samples=num_samples,
                            execution=self.execution,
                        )
                    ),
                },
                merge=partial(MERGES[merge], merge_start, channels, 3),
                roi_features=roi_features(),
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
        if self.execution.sampling == "grid":
            return super()._lay_out(maps, queries)
        return flat_maps(super()._lay_out(maps, queries), queries.geometry.dtype)
