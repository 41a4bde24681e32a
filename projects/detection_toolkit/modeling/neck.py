"""The neck: one projection a level, nothing between the levels."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["SharedNormChannelMapper", "checked_shapes"]


def checked_shapes(
    bottom_up: Backbone, in_features: Sequence[str], out_channels: int, norm_groups: int
) -> dict[str, ShapeSpec]:
    """Shapes of a backbone's maps, for a neck with group norms that follows it.

    Args:
        bottom_up: the backbone.
        in_features: names of the maps that the neck takes.
        out_channels, norm_groups: of the neck.

    Raises:
        UserError: the backbone has no such map, or the channels cannot be split into the groups.
    """
    shapes = bottom_up.output_shape()
    missing = [name for name in in_features if name not in shapes]
    if missing:
        raise UserError(
            f"the neck wants the maps {missing}, but the backbone yields {sorted(shapes)}: "
            "set model.backbone.in_features, or the backbone's own out_features"
        )
    if out_channels % norm_groups:
        raise UserError(f"{out_channels} channels cannot be split into {norm_groups} norm groups")
    return shapes


@BACKBONE_REGISTRY.register()
class SharedNormChannelMapper(Backbone):
    """On each level a 1x1 convolution to C channels, then a GroupNorm that all levels share.

    It wraps the backbone that it follows, as Detectron2's ``FPN`` does, so that any backbone with
    the wanted maps plugs in without its channel counts being written down again.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        *,
        norm_groups: int = 32,
    ):
        """
        Args:
            bottom_up: the backbone.
            in_features: names of its maps, finest first.
            out_channels: C.
            norm_groups: groups of the GroupNorm.

        Raises:
            ValueError: the backbone has no such map, or C cannot be split into the norm's groups.
        """
        super().__init__()
        shapes = checked_shapes(bottom_up, in_features, out_channels, norm_groups)
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self.projections = nn.ModuleList(
            nn.Conv2d(shapes[name].channels, out_channels, kernel_size=1) for name in in_features
        )
        self.norm = nn.GroupNorm(norm_groups, out_channels)
        for projection in self.projections:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        self._out_features = list(in_features)
        self._out_feature_channels = dict.fromkeys(in_features, out_channels)
        self._out_feature_strides = {name: shapes[name].stride for name in in_features}

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {name: (B, C, H_l, W_l)}, finest first."""
        features = self.bottom_up(image)
        return {
            name: self.norm(projection(features[name]))
            for name, projection in zip(self.in_features, self.projections)
        }
