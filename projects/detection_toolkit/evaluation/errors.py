"""What is wrong with a detector's answers: kinds of errors, confusion, calibration, by image.

Works on COCO results and ground truth. Kinds of errors follow TIDE (Bolya et al., ECCV 2020):
a detection that is no true positive at IoU 0.5 is, with its highest IoU with an object,

    localisation    same class, IoU in [0.1, 0.5)
    classification  another class, IoU >= 0.5
    duplicate       same class, IoU >= 0.5, but the object was found by a better detection
    background      IoU < 0.1 with every object
    both            anything else: another class and badly placed

and an object that neither a true positive nor one of the first two kinds refers to is missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..structures import box_iou
from .diagnosis import IGNORED, find_duplicates, match_detections

__all__ = [
    "ERRORS",
    "ErrorAnalysis",
    "ImageErrors",
    "Judged",
    "analyze_errors",
    "judge_image",
    "summarize_images",
]

ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")
_POSITIVE, _BACKGROUND = 0.5, 0.1


class ImageErrors(NamedTuple):
    """How well one image went, among detections that reach the score threshold."""

    image_id: int
    true_positives: int
    false_positives: int
    missed: int
    f1: float


class Judged(NamedTuple):
    """The detections of one image, best first, and its objects; D detections, M objects."""

    scores: np.ndarray
    """(D,)"""
    classes: np.ndarray
    """(D,)"""
    kinds: list[str]
    """"true", "ignored", or one of :data:`ERRORS`."""
    objects: np.ndarray
    """(D,) object that a true positive found or that an error refers to, -1 for none."""
    truth_classes: np.ndarray
    """(M,) without crowds."""
    missed: np.ndarray
    """(M,) bool."""
    duplicates: np.ndarray
    """(D,) bool: overlaps a better detection of its class by IoU > 0.7."""
    agnostic: np.ndarray
    """(D,) object found when classes are not looked at, -1 for none, -2 for ignored."""


class ErrorAnalysis(NamedTuple):
    """Sums over a data set."""

    counts: dict[str, int]
    """Errors of each kind among detections that reach the threshold, and missed objects then."""
    ap50: float
    """In percent, mean over the classes that have objects."""
    gains: dict[str, float]
    """How much AP50 would rise, in points, were the errors of one kind fixed (TIDE's dAP)."""
    confusion: np.ndarray
    """(K + 1, K + 1) objects by true (rows) and detected class; last row: nothing there, last
    column: not detected."""
    calibration: list[dict[str, float]]
    """For each tenth of the score: mean score, share of true positives, number."""
    calibration_error: float
    """Expected calibration error: mean of |share - score|, weighted by number."""
    detections: int
    duplicates: int
    images: list[ImageErrors]


def judge_image(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    truth_boxes: torch.Tensor,
    truth_classes: torch.Tensor,
    crowd: torch.Tensor,
) -> Judged:
    """Say of every detection of an image what it is.

    Args:
        boxes, scores, classes: (D, 4) ``xyxy``, (D,), (D,), in any order.
        truth_boxes, truth_classes, crowd: (M, 4), (M,), (M,) bool.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    found = match_detections(
        boxes, classes, truth_boxes, truth_classes, iou_threshold=_POSITIVE, crowd=crowd
    )
    agnostic = match_detections(
        boxes,
        torch.zeros_like(classes),
        truth_boxes,
        torch.zeros_like(truth_classes),
        iou_threshold=_POSITIVE,
        crowd=crowd,
    )
    real = (~crowd).nonzero()[:, 0]
    place = torch.full((len(crowd) + 1,), -1, dtype=torch.long)
    place[real] = torch.arange(len(real))
    objects, labels = truth_boxes[real], truth_classes[real]
    kinds, refers = [], []
    if len(real) and len(boxes):
        iou = box_iou(boxes[:, None], objects)
        same = classes[:, None] == labels
        own, own_at = torch.where(same, iou, -1.0).max(1)
        other, other_at = torch.where(~same, iou, -1.0).max(1)
        table = zip(*(x.tolist() for x in (found, own, own_at, other, other_at)))
    else:
        table = ((f, -1.0, -1, -1.0, -1) for f in found.tolist())
    for match, own_iou, own_index, other_iou, other_index in table:
        if match >= 0:
            kind, index = "true", int(place[match])
        elif match == IGNORED:
            kind, index = "ignored", -1
        elif _BACKGROUND <= own_iou < _POSITIVE:
            kind, index = "localisation", own_index
        elif other_iou >= _POSITIVE:
            kind, index = "classification", other_index
        elif own_iou >= _POSITIVE:
            kind, index = "duplicate", own_index
        elif max(own_iou, other_iou) < _BACKGROUND:
            kind, index = "background", -1
        else:
            kind, index = "both", -1
        kinds.append(kind)
        refers.append(index)
    covered = {i for k, i in zip(kinds, refers) if k in ("true", "localisation", "classification")}
    agnostic = torch.where(agnostic >= 0, place[agnostic.clamp(min=0)], agnostic)
    return Judged(
        scores.numpy(),
        classes.numpy(),
        kinds,
        np.array(refers, dtype=int),
        labels.numpy(),
        np.array([m not in covered for m in range(len(real))], dtype=bool),
        find_duplicates(boxes, classes, iou_threshold=0.7).numpy(),
        agnostic.numpy(),
    )


def analyze_errors(
    judged: Iterable[tuple[int, Judged]], *, num_classes: int, threshold: float
) -> ErrorAnalysis:
    """Add up the judgements of all images.

    Args:
        judged: (image id, judgement) of every image.
        num_classes: K.
        threshold: lowest score for the counts, the confusion matrix and the images. AP50, its
            gains and the calibration look at all detections.
    """
    images, everything = [], []
    counts = dict.fromkeys(ERRORS, 0)
    confusion = np.zeros((num_classes + 1, num_classes + 1), dtype=int)
    detections = duplicates = 0
    for image_id, j in judged:
        everything.append(j)
        kept = int((j.scores >= threshold).sum())  # they are sorted
        kinds = j.kinds[:kept]
        for kind in kinds:
            if kind in counts:
                counts[kind] += 1
        found = {i for k, i in zip(kinds, j.objects) if k == "true"}
        referred = {i for k, i in zip(kinds, j.objects) if k in ("localisation", "classification")}
        counts["missed"] += len(j.truth_classes) - len(found | referred)
        detections += kept
        duplicates += int(j.duplicates[:kept].sum())
        hit = set()
        for c, m in zip(j.classes[:kept], j.agnostic[:kept]):
            if m >= 0:
                confusion[j.truth_classes[m], c] += 1
                hit.add(m)
            elif m != IGNORED:
                confusion[-1, c] += 1
        for m, c in enumerate(j.truth_classes):
            if m not in hit:
                confusion[c, -1] += 1
        true = len(found)
        false = sum(k not in ("true", "ignored") for k in kinds)
        missed = len(j.truth_classes) - true
        whole = 2 * true + false + missed
        f1 = 2 * true / whole if whole else 1.0
        images.append(ImageErrors(image_id, true, false, missed, f1))
    bins, error = _calibrate(everything)
    base = _ap50(everything, num_classes, None)
    return ErrorAnalysis(
        counts=counts,
        ap50=base,
        gains={kind: _ap50(everything, num_classes, kind) - base for kind in ERRORS},
        confusion=confusion,
        calibration=bins,
        calibration_error=error,
        detections=detections,
        duplicates=duplicates,
        images=images,
    )


def _ap50(judged: Sequence[Judged], num_classes: int, fixed: str | None) -> float:
    """AP at IoU 0.5 in percent, by COCO's 101 points, after the errors of a kind are fixed.

    A classification or localisation error becomes a true positive if its object was not found,
    and vanishes otherwise; duplicates, backgrounds and both-wrong ones vanish; of missed objects
    nothing is demanded.
    """
    scores: list[list[float]] = [[] for _ in range(num_classes)]
    hits: list[list[bool]] = [[] for _ in range(num_classes)]
    positives = np.zeros(num_classes, dtype=int)
    for j in judged:
        positives += np.bincount(j.truth_classes, minlength=num_classes)
        if fixed == "missed":
            positives -= np.bincount(j.truth_classes[j.missed], minlength=num_classes)
        found = {i for k, i in zip(j.kinds, j.objects) if k == "true"}
        for score, label, kind, index in zip(j.scores, j.classes, j.kinds, j.objects):
            if kind == "ignored":
                continue
            true = kind == "true"
            if kind == fixed:
                if kind not in ("classification", "localisation") or index in found:
                    continue
                found.add(index)
                label, true = j.truth_classes[index], True
            scores[label].append(float(score))
            hits[label].append(true)
    values = []
    for c in range(num_classes):
        if positives[c] <= 0:
            continue
        order = np.argsort(-np.array(scores[c]), kind="stable")
        true = np.array(hits[c], dtype=float)[order].cumsum()
        recall = true / positives[c]
        precision = true / np.arange(1, len(true) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
        values.append(np.mean([precision[i] if i < len(precision) else 0.0 for i in at]))
    return 100 * float(np.mean(values)) if values else float("nan")


def _calibrate(judged: Sequence[Judged]) -> tuple[list[dict[str, float]], float]:
    scores = np.concatenate([j.scores for j in judged]) if judged else np.zeros(0)
    true = np.array([k == "true" for j in judged for k in j.kinds], dtype=bool)
    counted = np.array([k != "ignored" for j in judged for k in j.kinds], dtype=bool)
    scores, true = scores[counted], true[counted]
    bins, error = [], 0.0
    index = np.minimum((scores * 10).astype(int), 9)
    for i in range(10):
        inside = index == i
        if not inside.any():
            continue
        score, share = float(scores[inside].mean()), float(true[inside].mean())
        bins.append({"score": score, "share": share, "number": int(inside.sum())})
        error += abs(share - score) * inside.mean()
    return bins, float(error)


def summarize_images(analysis: ErrorAnalysis, count: int) -> dict[str, list[dict[str, Any]]]:
    """The best and the worst images by F1; among equals those with more right or more wrong."""
    order = sorted(
        analysis.images,
        key=lambda e: (e.f1, -(e.false_positives + e.missed), e.true_positives, e.image_id),
    )
    worst = [e for e in order if e.f1 < 1][:count]
    taken = {e.image_id for e in worst}
    best = [e for e in order[::-1] if e.image_id not in taken and e.true_positives][:count]
    return {"best": [e._asdict() for e in best], "worst": [e._asdict() for e in worst]}
