"""Box code and box arithmetic that Detectron2 and torchvision lack.

All functions broadcast over leading dimensions, so that one call serves the element-wise case
(``(..., 4)`` with ``(..., 4)``) and the pairwise one (``(..., N, 1, 4)`` with ``(..., 1, M, 4)``).
Boxes are ``xyxy`` in pixels unless a name says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "box_area",
    "box_iou",
    "box_to_xyzr",
    "generalized_box_iou",
    "intersection_over_foreground",
    "xyzr_to_box",
]


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


def box_area(boxes: Tensor) -> Tensor:
    """Area in square pixels, (..., 4) -> (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection_area(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    size = (bottom_right - top_left).clamp(min=0)
    return size[..., 0] * size[..., 1]


def intersection_over_foreground(boxes: Tensor, eps: float = 1e-6) -> Tensor:
    """Share of each box that each other box covers (the IoF of AdaMixer's self-attention).

    Args:
        boxes: (..., N, 4) ``xyxy``.
        eps: smallest area to divide by.

    Returns:
        (..., N, N); entry (i, j) is area(box_i with box_j) / area(box_i).
    """
    intersection = _intersection_area(boxes[..., :, None, :], boxes[..., None, :, :])
    return intersection / box_area(boxes).clamp(min=eps)[..., :, None]


def box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union of broadcast boxes, finite also for degenerate ones.

    Unlike ``torchvision.ops.box_iou`` it broadcasts over any leading dimensions, and a union
    below ``eps`` square pixels counts as ``eps``.
    """
    intersection = _intersection_area(boxes1, boxes2)
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return intersection / union.clamp(min=eps)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of broadcast boxes in pixels.

    Union and enclosing area below ``eps`` square pixels count as ``eps``, which keeps values and
    gradients finite; ``torchvision.ops.generalized_box_iou`` has no such floor.
    """
    intersection = _intersection_area(boxes1, boxes2)
    union = (box_area(boxes1) + box_area(boxes2) - intersection).clamp(min=eps)
    top_left = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    enclosing = (bottom_right - top_left).clamp(min=0).prod(dim=-1).clamp(min=eps)
    return intersection / union - (enclosing - union) / enclosing
