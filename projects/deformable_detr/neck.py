"""The neck: a projection and a norm of its own for each level, and one coarser level."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.layers import Conv2d
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from detection_toolkit.modeling.neck import checked_shapes

__all__ = ["ExtraLevelMapper"]


@BACKBONE_REGISTRY.register()
class ExtraLevelMapper(Backbone):
    """On each level a 1x1 convolution to C channels and a GroupNorm; the additional level is a 3x3
    convolution of stride 2 on the backbone's coarsest map.

    It wraps the backbone that it follows, as Detectron2's ``FPN`` does.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        *,
        norm_groups: int = 32,
        bias: bool = False,
    ):
        """
        Args:
            bottom_up: the backbone.
            in_features: names of its maps, finest first.
            out_channels: C.
            norm_groups: groups of the GroupNorms.
            bias: of the convolutions, as the authors' own code has.

        Raises:
            UserError: the backbone has no such map, or C cannot be split into the norms' groups.
        """
        super().__init__()
        shapes = checked_shapes(bottom_up, in_features, out_channels, norm_groups)
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)

        def projection(in_channels: int, size: int, stride: int) -> Conv2d:
            conv = Conv2d(
                in_channels,
                out_channels,
                kernel_size=size,
                stride=stride,
                padding=size // 2,
                bias=bias,
                norm=nn.GroupNorm(norm_groups, out_channels),
            )
            nn.init.xavier_uniform_(conv.weight)
            if bias:
                nn.init.zeros_(conv.bias)
            return conv

        self.projections = nn.ModuleList(
            projection(shapes[name].channels, 1, 1) for name in in_features
        )
        coarsest = shapes[in_features[-1]]
        self.extra = projection(coarsest.channels, 3, 2)
        self._out_features = [*in_features, "extra"]
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._out_feature_strides = {
            **{name: shapes[name].stride for name in in_features},
            "extra": 2 * coarsest.stride,
        }

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {name: (B, C, H_l, W_l)}, finest first."""
        features = self.bottom_up(image)
        maps = {
            name: projection(features[name])
            for name, projection in zip(self.in_features, self.projections)
        }
        return {**maps, "extra": self.extra(features[self.in_features[-1]])}
