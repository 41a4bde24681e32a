"""Box arithmetic that Detectron2 and torchvision lack.

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
    "cxcywh_norm",
    "generalized_box_iou",
    "intersection_area",
    "xyxy_norm",
]


def cxcywh_norm(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Centre and size of ``xyxy`` boxes as shares of their image.

    Args:
        boxes: (..., 4) ``xyxy`` in pixels.
        sizes: (..., 2) width and height of the image in pixels.

    Returns:
        (..., 4) centre x, centre y, width, height.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([0.5 * (low + high) / sizes, (high - low) / sizes], dim=-1)


def xyxy_norm(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Corners of ``xyxy`` boxes as shares of their image; arguments as of :func:`cxcywh_norm`."""
    return boxes / torch.cat([sizes, sizes], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area in square pixels, (..., 4) -> (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection_area(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Area in square pixels that broadcast boxes share, (..., 4) and (..., 4) -> (...)."""
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    size = (bottom_right - top_left).clamp(min=0)
    return size[..., 0] * size[..., 1]


def box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union of broadcast boxes, finite also for degenerate ones.

    Unlike ``torchvision.ops.box_iou`` it broadcasts over any leading dimensions, and a union
    below ``eps`` square pixels counts as ``eps``.
    """
    intersection = intersection_area(boxes1, boxes2)
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return intersection / union.clamp(min=eps)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of broadcast boxes in pixels.

    Union and enclosing area below ``eps`` square pixels count as ``eps``, which keeps values and
    gradients finite; ``torchvision.ops.generalized_box_iou`` has no such floor.
    """
    intersection = intersection_area(boxes1, boxes2)
    union = (box_area(boxes1) + box_area(boxes2) - intersection).clamp(min=eps)
    top_left = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    size = (bottom_right - top_left).clamp(min=0)
    # The backward pass of prod() looks for zeros and so would wait for a GPU. A CPU keeps it, as
    # its gradients round in another way: stored figures are repeated to the last digit.
    enclosing = (size[..., 0] * size[..., 1] if size.is_cuda else size.prod(dim=-1)).clamp(min=eps)
    return intersection / union - (enclosing - union) / enclosing
