"""Which queries are distinct: those that no better one covers, of whatever class (paper, section
3.2).

Letters: B images, N boxes of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

__all__ = ["distinct", "first_distinct"]

FAR = 8.0
"""Shares of an image between the boxes of two images, which then do not overlap."""


@torch.no_grad()
def distinct(
    boxes: Tensor, scores: Tensor, iou_threshold: float, candidates: Tensor | None = None
) -> Tensor:
    """The boxes that non-maximum suppression leaves.

    Args:
        boxes: (B, N, 4) ``xyxy``, as shares of their image.
        scores: (B, N).
        iou_threshold: of two boxes that overlap by more, the better one stays.
        candidates: (B, N) bool: the others neither stay nor suppress; None: all are.

    Returns:
        (B, N) bool.
    """
    scores = scores.to(boxes.dtype)
    if candidates is not None:
        scores = scores.masked_fill(~candidates, -torch.inf)  # the last suppress nothing
    if torch.compiler.is_compiling():
        kept = _at_once(boxes, scores, iou_threshold)
    else:
        image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        # What is not a number must not reach the other images; in double precision their distance
        # costs the boxes nothing.
        apart = boxes.double().nan_to_num(0.0).flatten(0, 1)
        index = batched_nms(apart, scores.double().flatten(), image, iou_threshold)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept.view(-1)[index] = True
    return kept if candidates is None else kept & candidates


@torch.no_grad()
def first_distinct(
    boxes: Tensor, scores: Tensor, iou_threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """The best of the boxes that non-maximum suppression leaves.

    Args:
        boxes, scores, iou_threshold: as for :func:`distinct`.
        count: how many; at most N.

    Returns:
        (B, count) which boxes, best first, and (B, count) bool, False at the end where there are
        fewer.
    """
    if torch.compiler.is_compiling():
        kept = distinct(boxes, scores, iou_threshold)
        index = scores.masked_fill(~kept, -torch.inf).topk(count, dim=1).indices
        return index, kept.gather(1, index)
    index = torch.zeros(len(boxes), count, dtype=torch.long, device=boxes.device)
    filled = torch.zeros_like(index, dtype=torch.bool)
    for b, own in enumerate(boxes):
        best = _first_of_image(own, scores[b].to(own.dtype), iou_threshold, count)
        index[b, : len(best)], filled[b, : len(best)] = best, True
    return index, filled


def _first_of_image(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
    order = scores.sort(descending=True, stable=True).indices
    size = 4 * count
    while True:
        # No box suppresses a better one: what is left of the best is left of all.
        part = order[:size]
        best = part[nms(boxes[part], scores[part], iou_threshold)][:count]
        if len(best) == count or size >= len(order):
            return best
        size *= 4


def _at_once(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """As :func:`distinct`, in one call for all images: a graph has no loop over them. The distance
    between the images costs the boxes some of their last digits."""
    batch = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    apart = boxes + FAR * batch[:, None, None]
    kept = nms(apart.flatten(0, 1), scores.flatten(), iou_threshold)
    mask = torch.zeros_like(scores.flatten(), dtype=torch.bool)
    return mask.index_fill(0, kept, True).view_as(scores)
