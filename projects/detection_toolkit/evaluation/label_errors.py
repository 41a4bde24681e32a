"""Annotations that a trained detector contradicts, ranked by how sure it is of it.

A detection of the last stage is a query with a class. The stages *agree* on it as far as the same
query had the same class and the same box before:

    agreement = mean over the earlier stages t of  same_t * IoU(box_t, box_last)

where same_t is 1 if the class is the likeliest one of the query after stage t, else 0. Without
stages it is 1. It counts for half, as first stages are often far from the answer: with p, the
detection's score, sure = p * (1 + agreement) / 2. With IoU, that with the annotation:

    missing    no annotation where the detection is          sure * (1 - largest IoU)
    class      an annotation of another class                sure * IoU * (1 - q)
    box        one of its class, but badly placed            sure * (1 - IoU)
    nothing    an annotation where no stage finds its class  recall * (1 - found) / 2

q is the highest score that the last stage gives the annotated class there; found is the largest
score * IoU that any query of any stage has for the annotation; recall is the share of the
annotations of its class that the last stage does find, as what is often missed says little.

Letters: S stages, N queries, K classes, D detections, M annotations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..structures import box_iou
from .diagnosis import match_detections

__all__ = ["KINDS", "Answer", "Suspect", "find_suspects", "rank_suspects"]

KINDS = {
    "missing": "nothing is annotated here",
    "class": "another class is annotated",
    "box": "the box is badly placed",
    "nothing": "no stage finds what is annotated",
}

_GOOD_IOU = 0.7  # from which on a box is as it should be
_SAME_OBJECT_IOU = 0.5  # from which on two boxes are about one object, whatever their classes
_LEAST_IOU = 0.1  # of a badly placed box with its object
_NOTHING = 0.25  # of score * IoU, below which an annotation is found by no stage
_IN_CROWD = 0.5  # share of a detection within a crowd region


class Answer(NamedTuple):
    """What a detector says of an image, in pixels of the image."""

    scores: Tensor
    """(D,) of the last stage's detections, best first."""
    classes: Tensor
    """(D,)"""
    boxes: Tensor
    """(D, 4) ``xyxy``"""
    queries: Tensor
    """(D,) index of their queries"""
    stage_scores: Tensor
    """(S, N, K); of a detector without stages its detections are the queries of one stage."""
    stage_boxes: Tensor
    """(S, N, 4)"""

    @classmethod
    def of_detections(
        cls, scores: Tensor, classes: Tensor, boxes: Tensor, num_classes: int
    ) -> Answer:
        """That of a detector without stages."""
        queries = torch.arange(len(scores))
        of_classes = scores.new_zeros(1, len(scores), num_classes)
        of_classes[0, queries, classes] = scores
        return cls(scores, classes, boxes, queries, of_classes, boxes[None])


class Suspect(NamedTuple):
    """An annotation that may be wrong, or a place where one may be missing."""

    kind: str
    """One of ``KINDS``."""
    score: float
    annotation: int | None
    """Index of the annotation; None where one is missing."""
    class_found: int | None
    """What the detector says; None where it finds nothing."""
    box_found: tuple[float, ...] | None
    """``xyxy`` in pixels of the image."""
    iou: float
    """Of the detection with the annotation, or the largest one with any."""
    detection_score: float
    """Of the detection; of "nothing": ``found``, see above."""
    agreement: float | None
    """Of the stages on the detection; None where there is none."""


def find_suspects(
    answer: Answer,
    truth_boxes: Tensor,
    truth_classes: Tensor,
    *,
    crowd: Tensor | None = None,
    threshold: float = 0.5,
) -> tuple[list[Suspect], Tensor]:
    """What a detector contradicts in one image.

    Args:
        answer: of the detector.
        truth_boxes: (M, 4) ``xyxy`` in pixels of the image.
        truth_classes: (M,).
        crowd: (M,) bool; nothing is said of crowds, nor within them.
        threshold: least score of a detection that counts.

    Returns:
        the suspects, those of the kind "nothing" without their recall yet, and (M,) bool: the
        annotation is found where it is, with its class.
    """
    crowd = torch.zeros(len(truth_boxes), dtype=torch.bool) if crowd is None else crowd
    kept = answer.scores >= threshold
    scores, classes = answer.scores[kept], answer.classes[kept]
    boxes, queries = answer.boxes[kept], answer.queries[kept]
    agreement = _agreement(answer, queries, classes)
    sure = scores * (1 + agreement) / 2

    def suspect(kind: str, doubt: float, annotation: int | None, i: int, overlap: float) -> Suspect:
        score, label = float(sure[i]) * doubt, int(classes[i])
        box, agreed = tuple(boxes[i].tolist()), float(agreement[i])
        return Suspect(kind, score, annotation, label, box, overlap, float(scores[i]), agreed)

    found = match_detections(
        boxes, classes, truth_boxes, truth_classes, iou_threshold=_GOOD_IOU, crowd=crowd
    )
    is_found = torch.zeros(len(truth_boxes), dtype=torch.bool)
    is_found[found[found >= 0]] = True
    iou = box_iou(boxes[:, None], truth_boxes)  # (D, M)
    suspects = []
    left = {i for i in range(len(boxes)) if found[i] < 0}
    open_truth = {j for j in range(len(truth_boxes)) if not (is_found[j] or crowd[j])}
    for _, i, j in sorted(_pairs(iou, classes, truth_classes, left, open_truth), reverse=True):
        if i not in left or j not in open_truth:
            continue
        left.remove(i)
        open_truth.remove(j)
        overlap = float(iou[i, j])
        if classes[i] == truth_classes[j]:
            suspects.append(suspect("box", 1 - overlap, j, i, overlap))
        else:
            other = _score_there(answer, truth_boxes[j], truth_classes[j])
            suspects.append(suspect("class", overlap * (1 - other), j, i, overlap))
    for i in sorted(left):
        overlap = float(iou[i].max()) if len(truth_boxes) else 0.0
        if overlap < _SAME_OBJECT_IOU and not _is_in_crowd(boxes[i], truth_boxes[crowd]):
            suspects.append(suspect("missing", 1 - overlap, None, i, overlap))
    for j in sorted(open_truth):
        evidence = _evidence(answer, truth_boxes[j], truth_classes[j])
        if evidence < _NOTHING:
            overlap = float(iou[:, j].max()) if len(boxes) else 0.0
            value = (1 - evidence) / 2
            suspects.append(Suspect("nothing", value, j, None, None, overlap, evidence, None))
    return suspects, is_found


def rank_suspects(
    found: Iterable[tuple[Sequence[Suspect], Tensor, Tensor]],
) -> list[tuple[int, Suspect]]:
    """Suspects of all images, the surest first.

    Args:
        found: for each image the suspects, (M,) which annotations are found, and (M,) their
            classes, without crowds.

    Returns:
        (index of the image, suspect).
    """
    found = list(found)
    rates: dict[int, tuple[int, int]] = {}
    for _, is_found, classes in found:
        for key, right in zip(classes.tolist(), is_found.tolist()):
            hits, count = rates.get(key, (0, 0))
            rates[key] = (hits + right, count + 1)
    recall = {key: hits / count for key, (hits, count) in rates.items()}
    ranked = []
    for place, (suspects, _, classes) in enumerate(found):
        for suspect in suspects:
            if suspect.kind == "nothing":
                share = recall[int(classes[suspect.annotation])]
                suspect = suspect._replace(score=suspect.score * share)
            ranked.append((place, suspect))
    return sorted(ranked, key=lambda pair: -pair[1].score)


def _pairs(
    iou: Tensor, classes: Tensor, truth_classes: Tensor, left: set[int], open_truth: set[int]
) -> Iterable[tuple[float, int, int]]:
    """(IoU, detection, annotation) of those that may be about one object."""
    for i in left:
        for j in open_truth:
            same = classes[i] == truth_classes[j]
            if iou[i, j] >= (_LEAST_IOU if same else _SAME_OBJECT_IOU):
                yield float(iou[i, j]), i, j


def _agreement(answer: Answer, queries: Tensor, classes: Tensor) -> Tensor:
    """(D,) of the earlier stages with the last."""
    if len(answer.stage_scores) == 1:
        return torch.ones(len(queries))
    scores = answer.stage_scores[:-1, queries]  # (S - 1, D, K)
    same = (scores.argmax(-1) == classes).float()
    boxes = answer.stage_boxes[:, queries]
    return (same * box_iou(boxes[:-1], boxes[-1:])).mean(0)


def _score_there(answer: Answer, box: Tensor, label: Tensor) -> float:
    """The highest score of a class after the last stage, of queries that are about a box."""
    there = box_iou(answer.stage_boxes[-1], box) >= _SAME_OBJECT_IOU
    scores = answer.stage_scores[-1, there, label]
    return float(scores.max()) if len(scores) else 0.0


def _evidence(answer: Answer, box: Tensor, label: Tensor) -> float:
    """The largest score * IoU of any query of any stage."""
    if not answer.stage_boxes.shape[1]:
        return 0.0
    return float((answer.stage_scores[..., label] * box_iou(answer.stage_boxes, box)).max())


def _is_in_crowd(box: Tensor, regions: Tensor) -> bool:
    if not len(regions):
        return False
    size = (torch.minimum(box[2:], regions[:, 2:]) - torch.maximum(box[:2], regions[:, :2])).clamp(
        min=0
    )
    area = (box[2:] - box[:2]).prod().clamp(min=1e-6)
    return bool((size.prod(-1) / area >= _IN_CROWD).any())
