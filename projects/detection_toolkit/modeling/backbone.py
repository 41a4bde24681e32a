"""What Detectron2's backbones lack for this detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["FrozenStatsBatchNorm2d", "PlainConvNet"]


class FrozenStatsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics while its affine part is trained.

    Detectron2's ``FrozenBatchNorm2d`` freezes the affine part as well; the released recipe
    trains it. Pass the class as ``norm`` to Detectron2's ResNet.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


@BACKBONE_REGISTRY.register()
class PlainConvNet(Backbone):
    """Eight plain 3x3 convolutions for small images: two a level, the first with stride 2.

    Meant for small data sets, tests and demonstrations. The stem's two convolutions have stride
    2 each, so the maps ``res2`` .. ``res5`` have strides 4, 8, 16 and 32.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 96, 128),
        *,
        in_channels: int = 3,
        norm_groups: int = 8,
    ):
        """
        Args:
            widths: channels of the four maps.
            in_channels: channels of the image.
            norm_groups: groups of the GroupNorm after each convolution; must divide the widths.
        """
        super().__init__()
        if len(widths) != 4:
            raise UserError(f"four widths are needed, one a level, got {list(widths)}")
        self._out_features = ["res2", "res3", "res4", "res5"]
        self._out_feature_channels = dict(zip(self._out_features, widths))
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32)))
        channels = in_channels
        for level, (name, width) in enumerate(zip(self._out_features, widths)):
            second_stride = 2 if level == 0 else 1
            block = nn.Sequential(
                *_conv_norm_relu(channels, width, stride=2, norm_groups=norm_groups),
                *_conv_norm_relu(width, width, stride=second_stride, norm_groups=norm_groups),
            )
            self.add_module(name, block)
            channels = width

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"res2": (B, C2, H / 4, W / 4), ...}."""
        features = {}
        x = image
        for name in self._out_features:
            x = getattr(self, name)(x)
            features[name] = x
        return features

    @property
    def size_divisibility(self) -> int:
        return 32


def _conv_norm_relu(
    in_channels: int, out_channels: int, *, stride: int, norm_groups: int
) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.GroupNorm(norm_groups, out_channels), nn.ReLU(inplace=True)]
