"""The code of the query boxes, and how boxes overlap in the self-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from detection_toolkit.structures.boxes import box_area, intersection_area

__all__ = ["box_to_xyzr", "intersection_over_foreground", "xyzr_to_box", "xyzr_to_size"]


def xyzr_to_box(xyzr: Tensor) -> Tensor:
    """Decode the query geometry into corners.

    Args:
        xyzr: (..., 4) centre x, centre y in pixels, z = log2 of the scale, r = log2 of the aspect
            ratio, so that width = 2^(z - r/2) and height = 2^(z + r/2).

    Returns:
        (..., 4) ``xyxy`` in pixels.
    """
    center = xyzr[..., :2]
    half_size = 0.5 * xyzr_to_size(xyzr)
    return torch.cat([center - half_size, center + half_size], dim=-1)


def xyzr_to_size(xyzr: Tensor) -> Tensor:
    """Width and height in pixels of boxes in xyzr code: (..., 4) -> (..., 2)."""
    z, r = xyzr[..., 2], xyzr[..., 3]
    return torch.stack([torch.exp2(z - 0.5 * r), torch.exp2(z + 0.5 * r)], dim=-1)


def box_to_xyzr(boxes: Tensor) -> Tensor:
    """Inverse of :func:`xyzr_to_box`; boxes must have positive width and height.

    Args:
        boxes: (..., 4) ``xyxy`` in pixels.

    Returns:
        (..., 4) xyzr.
    """
    width = boxes[..., 2] - boxes[..., 0]
    height = boxes[..., 3] - boxes[..., 1]
    center = 0.5 * (boxes[..., :2] + boxes[..., 2:])
    z = 0.5 * (torch.log2(width) + torch.log2(height))
    r = torch.log2(height) - torch.log2(width)
    return torch.cat([center, z[..., None], r[..., None]], dim=-1)


def intersection_over_foreground(boxes: Tensor, eps: float = 1e-6) -> Tensor:
    """Share of each box that each other box covers (AdaMixer's IoF).

    Args:
        boxes: (..., N, 4) ``xyxy``.
        eps: smallest area to divide by.

    Returns:
        (..., N, N); entry (i, j) is area(box_i with box_j) / area(box_i).
    """
    intersection = intersection_area(boxes[..., :, None, :], boxes[..., None, :, :])
    return intersection / box_area(boxes).clamp(min=eps)[..., :, None]
