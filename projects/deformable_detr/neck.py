"""The neck: a projection and a norm of its own for each level, and one coarser level or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.layers import Conv2d
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from detection_toolkit.modeling.neck import checked_shapes

__all__ = ["ExtraLevelMapper", "LevelMapper"]


@BACKBONE_REGISTRY.register()
class LevelMapper(Backbone):
    """On each level a 1x1 convolution to C channels and a GroupNorm of its own.

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
        self._shapes = checked_shapes(bottom_up, in_features, out_channels, norm_groups)
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self.projections = nn.ModuleList(
            _projection(self._shapes[name].channels, out_channels, 1, norm_groups, bias)
            for name in in_features
        )
        self._out_features = [*in_features]
        self._out_feature_channels = dict.fromkeys(in_features, out_channels)
        self._out_feature_strides = {name: self._shapes[name].stride for name in in_features}

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {name: (B, C, H_l, W_l)}, finest first."""
        return self.project(self.bottom_up(image))

    def project(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps of the backbone -> those of the neck."""
        return {
            name: projection(features[name])
            for name, projection in zip(self.in_features, self.projections)
        }


@BACKBONE_REGISTRY.register()
class ExtraLevelMapper(LevelMapper):
    """With an additional level: a 3x3 convolution of stride 2 on the backbone's coarsest map."""

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
            bottom_up, in_features, out_channels, norm_groups, bias: see :class:`LevelMapper`.

        Raises:
            UserError: see :class:`LevelMapper`.
        """
        super().__init__(bottom_up, in_features, out_channels, norm_groups=norm_groups, bias=bias)
        coarsest = self._shapes[in_features[-1]]
        self.extra = _projection(coarsest.channels, out_channels, 3, norm_groups, bias)
        self._out_features.append("extra")
        self._out_feature_channels["extra"] = out_channels
        self._out_feature_strides["extra"] = 2 * coarsest.stride

    def project(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        maps = super().project(features)
        return {**maps, "extra": self.extra(features[self.in_features[-1]])}


def _projection(
    in_channels: int, out_channels: int, size: int, norm_groups: int, bias: bool
) -> Conv2d:
    """A convolution of 1x1, or of 3x3 with stride 2, and its norm."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=size,
        stride=2 if size > 1 else 1,
        padding=size // 2,
        bias=bias,
        norm=nn.GroupNorm(norm_groups, out_channels),
    )
    nn.init.xavier_uniform_(conv.weight)
    if bias:
        nn.init.zeros_(conv.bias)
    return conv
