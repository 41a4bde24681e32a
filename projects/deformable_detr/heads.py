"""Prediction heads, and the boxes that they make of a reference.

Letters: B images, N queries, C channels, K classes, D numbers of a reference: a point (2) or a box
(4), centre and size as shares of the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

__all__ = ["PredictionHead", "boxes_in_pixels", "inverse_sigmoid", "move_reference"]

SCORE_AT_START = 0.01


class PredictionHead(nn.Module):
    """One linear layer for the classes, three for the box."""

    def __init__(self, channels: int, num_classes: int, *, size_logit: float = -2.0):
        """
        Args:
            channels: C.
            num_classes: K.
            size_logit: what width and height start from: the logit of their share of the image
                beside a point, a change beside a box.
        """
        super().__init__()
        self.classes = nn.Linear(channels, num_classes)
        last = nn.Linear(channels, 4)
        self.box = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            last,
        )
        nn.init.constant_(self.classes.bias, -math.log((1 - SCORE_AT_START) / SCORE_AT_START))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.constant_(last.bias[2:], size_logit)

    def forward(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> class logits (B, N, K) and changes of the reference's logits (B, N, 4)."""
        return self.classes(content), self.box(content)


def inverse_sigmoid(shares: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits of values in [0, 1], finite at both ends."""
    shares = shares.clamp(0, 1)
    return torch.log(shares.clamp(min=eps) / (1 - shares).clamp(min=eps))


def move_reference(reference: Tensor, delta: Tensor, eps: float = 1e-5) -> Tensor:
    """The box (..., 4) that a change (..., 4) of logits makes of a reference (..., D).

    A point has no size to change: there the change is the logit of the size. ``eps`` is that of
    :func:`inverse_sigmoid`.
    """
    logits = inverse_sigmoid(reference, eps)
    return (delta + F.pad(logits, (0, 4 - logits.shape[-1]))).sigmoid()


def boxes_in_pixels(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes, centre and size as shares of their image, as ``xyxy`` in pixels.

    Args:
        boxes: (R B, N, 4).
        image_sizes: (B, 2) heights and widths; the R sets of an image stand together.
    """
    sizes = image_sizes.flip(-1).repeat(1, 2).to(boxes)  # w, h, w, h
    sizes = sizes.repeat_interleave(boxes.shape[0] // sizes.shape[0], 0)
    return box_convert(boxes, "cxcywh", "xyxy") * sizes[:, None]
