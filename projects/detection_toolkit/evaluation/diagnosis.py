"""What the stages do to one another's answers: fading, growing, duplicates, changing labels.

Everything here counts on the predictions of one image or batch, so that the counts of many can be
added up. Letters: S stages, B images, N queries, K classes, D detections, M objects.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..structures import ClassTargets, box_iou

__all__ = [
    "IGNORED",
    "LabelChanges",
    "ScoreChanges",
    "count_label_changes",
    "count_score_changes",
    "find_duplicates",
    "match_detections",
]

IGNORED = -2
"""In the result of :func:`match_detections`: the detection lies in a crowd region."""


class ScoreChanges(NamedTuple):
    """Counts of the last stage's detections, see :func:`count_score_changes`."""

    true_positives: Tensor
    """() long."""
    faded: Tensor
    """(S,) long: those that were better after stage 0, ..., S - 2; last entry: after any."""
    false_positives: Tensor
    """() long."""
    grown: Tensor
    """(S,) long: those that scored lower after stage 0, ..., S - 2; last entry: after any."""


class LabelChanges(NamedTuple):
    """Counts over queries, for each step from a stage to the next."""

    changed: Tensor
    """(S - 1,) long: the class target of the query differs between the two stages."""
    labelled: Tensor
    """(S - 1,) long: the query has a class target in at least one of the two stages."""
    queries: Tensor
    """() long: all queries."""


def match_detections(
    boxes: Tensor,
    classes: Tensor,
    truth_boxes: Tensor,
    truth_classes: Tensor,
    *,
    iou_threshold: float,
    crowd: Tensor | None = None,
) -> Tensor:
    """Which object each detection finds, by the rule of COCO's evaluation.

    From the best detection down, each takes the object of its class that it overlaps most among
    those not taken yet, where their IoU reaches the threshold. One that finds none, and of whose
    area a crowd region of its class covers the threshold's share, is ignored.

    Args:
        boxes: (D, 4) ``xyxy``, best first.
        classes: (D,).
        truth_boxes: (M, 4) ``xyxy``.
        truth_classes: (M,).
        iou_threshold: lowest IoU of a true positive.
        crowd: (M,) bool; default: no object is a crowd.

    Returns:
        (D,) long: index of the object, -1 for a false positive, ``IGNORED``.
    """
    found = torch.full((len(boxes),), -1, dtype=torch.long)
    if not len(truth_boxes) or not len(boxes):
        return found
    crowd = torch.zeros(len(truth_boxes), dtype=torch.bool) if crowd is None else crowd
    same_class = classes[:, None] == truth_classes
    iou = box_iou(boxes[:, None], truth_boxes)  # (D, M)
    iou = torch.where(same_class & ~crowd, iou, -1.0)
    for i in range(len(boxes)):
        overlap, index = iou[i].max(0)
        if overlap >= iou_threshold:
            found[i] = index
            iou[:, index] = -1.0
    if crowd.any():
        regions = truth_boxes[crowd]
        top_left = torch.maximum(boxes[:, None, :2], regions[:, :2])
        size = (torch.minimum(boxes[:, None, 2:], regions[:, 2:]) - top_left).clamp(min=0)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).clamp(min=1e-6)
        covered = size.prod(-1) / area[:, None]  # (D, crowds)
        inside = ((covered >= iou_threshold) & same_class[:, crowd]).any(1)
        found[(found == -1) & inside] = IGNORED
    return found


def count_score_changes(
    scores: Tensor,
    boxes: Tensor,
    *,
    queries: Tensor,
    classes: Tensor,
    found: Tensor,
    truth_boxes: Tensor,
) -> ScoreChanges:
    """True positives that fade and false positives that grow on the way to the last stage.

    The diagnosis of "Enhanced Training of Query-Based Object Detection via Selective Query
    Recollection" (Chen et al., CVPR 2023). A detection of the last stage is a query with a class;
    what the same query said about the same class earlier is compared.

    - A true positive *fades* from stage t to the last if stage t gave its class a higher score
      and its box a higher IoU with the object that the detection finds: stage t had the better
      answer, and the later stages spoilt it.
    - A false positive *grows* from stage t to the last if stage t gave its class a lower score.

    Both are counted for each t and for "any t". All detections that an image keeps are counted,
    as in COCO's AP, without a threshold on their score. Detections in crowd regions are left out.

    Args:
        scores: (S, N, K) class scores of one image.
        boxes: (S, N, 4) ``xyxy``.
        queries: (D,) the query of each detection of the last stage.
        classes: (D,) its class.
        found: (D,) from :func:`match_detections`, on the last stage's boxes.
        truth_boxes: (M, 4), on the scale of ``boxes``.
    """
    score = scores[:, queries, classes]  # (S, D)
    lower = score[:-1] < score[-1]
    higher = score[:-1] > score[-1]
    is_true, is_false = found >= 0, found == -1
    if len(truth_boxes):
        objects = truth_boxes[found.clamp(min=0)]  # (D, 4)
        iou = box_iou(boxes[:, queries], objects)  # (S, D)
        faded = higher & (iou[:-1] > iou[-1]) & is_true
    else:
        faded = torch.zeros_like(higher)
    grown = lower & is_false

    def per_stage_and_any(hits: Tensor) -> Tensor:
        return torch.cat([hits.sum(1), hits.any(0).sum()[None]])

    return ScoreChanges(
        true_positives=is_true.sum(),
        faded=per_stage_and_any(faded),
        false_positives=is_false.sum(),
        grown=per_stage_and_any(grown),
    )


def find_duplicates(boxes: Tensor, classes: Tensor, *, iou_threshold: float) -> Tensor:
    """Detections that overlap a better one of the same class.

    Args:
        boxes: (D, 4) ``xyxy``, best first.
        classes: (D,).
        iou_threshold: the IoU must exceed it.

    Returns:
        (D,) bool.
    """
    overlaps = box_iou(boxes[:, None], boxes) > iou_threshold
    same = classes[:, None] == classes
    return (overlaps & same).tril(-1).any(1)


def count_label_changes(targets: ClassTargets) -> LabelChanges:
    """Queries whose class target changes from a stage to the next.

    A query's class target is its row of the multi-hot targets; background is a row of zeros. So
    gaining, losing and exchanging a label all are changes, and staying background is none.
    """
    multi_hot = targets.multi_hot.bool()
    changed = (multi_hot[1:] != multi_hot[:-1]).any(-1)  # (S - 1, B, N)
    labelled = (multi_hot[1:] | multi_hot[:-1]).any(-1)
    return LabelChanges(
        changed=changed.sum((1, 2)),
        labelled=labelled.sum((1, 2)),
        queries=torch.tensor(multi_hot.shape[1] * multi_hot.shape[2]),
    )
