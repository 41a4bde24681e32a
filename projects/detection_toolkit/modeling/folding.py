"""Convolutions with the norm behind them in their weights."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from .backbone import FrozenStatsBatchNorm2d

__all__ = ["FoldedConv2d", "fold_frozen_norms"]


class FoldedConv2d(Conv2d):
    """Detectron2's convolution, whose norm has fixed statistics, without a pass for the norm.

    A norm with fixed statistics multiplies each channel by a factor and adds a number. Here the
    factor goes into the weights, and the number is the convolution's bias, so that neither the
    forward nor the backward pass touches the map once more. Weights and norm stay separate
    parameters; the product is made anew at each call, and gradients flow through it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(module: nn.Module) -> None:
    """Let all convolutions of Detectron2 in ``module`` whose norm has fixed statistics fold it.

    Parameters, buffers and their names stay.
    """
    for part in module.modules():
        if type(part) is Conv2d and isinstance(
            part.norm, (FrozenBatchNorm2d, FrozenStatsBatchNorm2d)
        ):
            part.__class__ = FoldedConv2d
