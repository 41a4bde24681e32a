"""Deformable convolution v1 for Detectron2's ResNet, on torchvision's operator.

Detectron2's own ``DeformBottleneckBlock`` needs its compiled extension; torchvision's operator runs
on CPU and GPU wherever torchvision does.
"""

from __future__ import annotations

from detectron2.layers import get_norm
from detectron2.modeling.backbone.resnet import BottleneckBlock
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

__all__ = ["DeformBottleneckBlock", "OffsetDeformConv2d"]


class OffsetDeformConv2d(DeformConv2d):
    """Deformable convolution v1 (Dai et al., ICCV 2017) that predicts its own offsets.

    An ordinary convolution of the same kernel, stride and padding, with bias, yields (dy, dx) of
    every kernel point; its weight and bias start at zero, so that training starts from the
    ordinary convolution. One group of offsets serves all channels. A norm may follow, as in
    ``detectron2.layers.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        norm: nn.Module | None = None,
    ):
        """
        Args:
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups: of the
                deformable convolution, which has no bias.
            norm: module applied to the result.
        """
        geometry = dict(stride=stride, padding=padding, dilation=dilation)
        super().__init__(
            in_channels, out_channels, kernel_size, **geometry, groups=groups, bias=False
        )
        self.offset = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, **geometry)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        # torchvision computes in float32 under autocast, and has no half precision on a CPU.
        inputs = (value.to(self.weight.dtype) for value in (x, self.offset(x)))
        y = super().forward(*inputs).to(x.dtype)
        return y if self.norm is None else self.norm(y)


class DeformBottleneckBlock(BottleneckBlock):
    """Detectron2's ``BottleneckBlock`` with a deformable 3x3 convolution.

    Use it as ``block_class`` of ``ResNet.make_stage``. Arguments are those of
    ``BottleneckBlock``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm="BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ):
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
        )
        self.conv2 = OffsetDeformConv2d(
            bottleneck_channels,
            bottleneck_channels,
            3,
            stride=1 if stride_in_1x1 else stride,
            padding=dilation,
            dilation=dilation,
            groups=num_groups,
            norm=get_norm(norm, bottleneck_channels),
        )
        c2_msra_fill(self.conv2)
