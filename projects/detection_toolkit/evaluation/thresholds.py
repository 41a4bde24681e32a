"""Precision, recall and F1 over the score threshold, and how well each image went at one.

From the matches of COCO's evaluation at IoU 0.5: a threshold takes the worst detections away and
leaves the matches of the others as they are. Letters: D detections, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "ImageErrors",
    "Matches",
    "ThresholdCurve",
    "judge_images",
    "match_by_class",
    "sample_thresholds",
    "sweep_thresholds",
    "summarize_images",
]


class Matches(NamedTuple):
    """Detections and number of objects of one class in one image, without crowds."""

    image_id: Any
    class_id: Any
    scores: np.ndarray
    """(D,)"""
    is_true: np.ndarray
    """(D,) bool: it finds an object that no better detection has found."""
    objects: int


class ThresholdCurve(NamedTuple):
    """What is kept by each threshold that makes a difference, from the highest one down."""

    thresholds: np.ndarray
    """(T,) distinct scores; the detections that reach one are kept."""
    precision: np.ndarray
    """(T,) share of what is kept that is right."""
    recall: np.ndarray
    """(T,) share of the objects that is found."""
    f1: np.ndarray
    """(T,) harmonic mean of both."""

    @property
    def best(self) -> int | None:
        """Index of the threshold with the highest F1, the higher one of equals; None without
        detections or objects."""
        return int(self.f1.argmax()) if np.isfinite(self.f1).any() else None


class ImageErrors(NamedTuple):
    """How well one image went, among detections that reach the score threshold."""

    image_id: Any
    true_positives: int
    false_positives: int
    missed: int
    f1: float


def match_by_class(evaluation: Any) -> list[Matches]:
    """The matches of COCO's evaluation at its first IoU threshold, 0.5.

    Args:
        evaluation: a ``COCOeval`` after ``evaluate()``.
    """
    whole_range = list(evaluation.params.areaRng[0])
    matches = []
    for entry in evaluation.evalImgs:
        if entry is None or list(entry["aRng"]) != whole_range:
            continue
        counted = ~np.asarray(entry["dtIgnore"][0], dtype=bool)
        matches.append(
            Matches(
                entry["image_id"],
                entry["category_id"],
                np.asarray(entry["dtScores"], dtype=np.float64)[counted],
                np.asarray(entry["dtMatches"][0], dtype=np.float64)[counted] > 0,
                int((~np.asarray(entry["gtIgnore"], dtype=bool)).sum()),
            )
        )
    return matches


def sweep_thresholds(matches: Sequence[Matches]) -> ThresholdCurve:
    """Precision, recall and F1 of some classes and images together, at every threshold.

    Recall and F1 are NaN where there are no objects.
    """
    scores = np.concatenate([m.scores for m in matches]) if matches else np.zeros(0)
    is_true = np.concatenate([m.is_true for m in matches]) if matches else np.zeros(0, bool)
    objects = sum(m.objects for m in matches)
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], is_true[order].cumsum()
    # Of equal scores all are kept or none.
    last = np.flatnonzero(np.diff(scores, append=-np.inf))
    kept, found = last + 1, found[last]
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = found / objects if objects else np.full(len(last), np.nan)
        f1 = 2 * found / (kept + objects) if objects else np.full(len(last), np.nan)
    return ThresholdCurve(scores[last], found / kept, recall, f1)


def sample_thresholds(matches: Sequence[Matches]) -> dict[str, list[float | None]]:
    """What :func:`sweep_thresholds` finds, at the 101 thresholds 0, 0.01, ..., 1.

    Returns:
        "threshold", "precision", "recall", "f1"; None where nothing is kept, or nothing is there.
    """
    curve = sweep_thresholds(matches)
    grid = np.linspace(0, 1, 101)
    # The last of the thresholds, which fall, that is at least as high; -1: nothing is kept.
    places = np.searchsorted(-curve.thresholds, -grid, side="right") - 1
    has_objects = any(m.objects for m in matches)
    sampled: dict[str, list[float | None]] = {"threshold": grid.tolist()}
    for name in ("precision", "recall", "f1"):
        values = getattr(curve, name)
        empty = None if name == "precision" or not has_objects else 0.0
        picked = [float(values[p]) if p >= 0 else empty for p in places]
        sampled[name] = [None if v is None or np.isnan(v) else v for v in picked]
    return sampled


def judge_images(
    matches: Sequence[Matches], image_ids: Sequence[Any], *, threshold: float
) -> list[ImageErrors]:
    """Right, wrong and missed ones of every image, and F1; 1 where nothing is there or found."""
    counts = {i: np.zeros(3, dtype=int) for i in image_ids}  # right, kept, objects
    for m in matches:
        kept = m.scores >= threshold
        counts[m.image_id] += (int(m.is_true[kept].sum()), int(kept.sum()), m.objects)
    images = []
    for image_id, (right, kept, objects) in ((i, c.tolist()) for i, c in counts.items()):
        whole = kept + objects
        f1 = 2 * right / whole if whole else 1.0
        images.append(ImageErrors(image_id, right, kept - right, objects - right, f1))
    return images


def summarize_images(images: Sequence[ImageErrors], count: int) -> dict[str, list[dict[str, Any]]]:
    """The best and the worst images by F1; among equals those with more right or more wrong."""
    order = sorted(
        images,
        key=lambda e: (e.f1, -(e.false_positives + e.missed), e.true_positives, e.image_id),
    )
    worst = [e for e in order if e.f1 < 1][:count]
    taken = {e.image_id for e in worst}
    best = [e for e in order[::-1] if e.image_id not in taken and e.true_positives][:count]
    return {"best": [e._asdict() for e in best], "worst": [e._asdict() for e in worst]}
