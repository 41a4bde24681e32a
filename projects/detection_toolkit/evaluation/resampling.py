"""COCO's AP of many resamples of a test set, from one evaluation.

A resample draws as many images as there are, with replacement. Its AP is what COCO's evaluation
gives for a data set in which an image that was drawn w times stands w times, each under an id of
its own. Matches are found within an image and a class, so they are found once; only the order by
score, and what is counted, is of all images.

Letters: N images, R resamples, K classes, A ranges of object size, T IoU thresholds, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "RankedMatches",
    "average_precision",
    "collect_matches",
    "draw_resamples",
    "resampled_precision",
]

_RECALL = np.linspace(0.0, 1.0, 101)
_MOST = 4_000_000  # numbers of an array at a time


class RankedMatches(NamedTuple):
    """Detections of one class, with the objects of one range of sizes, of all images."""

    images: np.ndarray
    """(D,) index of the image of each detection, best first."""
    is_true: np.ndarray
    """(T, D) bool: it finds an object that counts."""
    is_ignored: np.ndarray
    """(T, D) bool: it is neither right nor wrong."""
    objects: np.ndarray
    """(N,) objects that count, of each image."""


def draw_resamples(num_images: int, count: int, *, seed: int = 0) -> np.ndarray:
    """(R, N) how many times each image is drawn; N in each row."""
    generator = np.random.default_rng(seed)
    shares = np.full(num_images, 1 / num_images)
    return generator.multinomial(num_images, shares, size=count).astype(np.int32)


def collect_matches(evaluation: Any, image_ids: Sequence[Any]) -> list[list[RankedMatches]]:
    """The matches of COCO's evaluation, best detection first.

    Args:
        evaluation: a ``COCOeval`` after ``evaluate()``, of pycocotools or hotcoco.
        image_ids: of all N images.

    Returns:
        [class][range of sizes], in the evaluation's order.
    """
    params = evaluation.params
    classes = {key: k for k, key in enumerate(params.catIds)}
    ranges = {tuple(limits): a for a, limits in enumerate(params.areaRng)}
    places = {key: i for i, key in enumerate(image_ids)}
    parts: list[list[list[dict[str, Any]]]] = [[[] for _ in ranges] for _ in classes]
    for entry in evaluation.evalImgs:
        if entry is not None:
            parts[classes[entry["category_id"]]][ranges[tuple(entry["aRng"])]].append(entry)
    thresholds = len(params.iouThrs)
    return [[_rank(entries, places, thresholds) for entries in row] for row in parts]


def _rank(
    entries: Sequence[dict[str, Any]], places: dict[Any, int], thresholds: int
) -> RankedMatches:
    objects = np.zeros(len(places), dtype=np.int64)
    scores, images = [np.zeros(0)], [np.zeros(0, dtype=np.int32)]
    found, ignored = ([np.zeros((thresholds, 0), dtype=bool)] for _ in range(2))
    for entry in entries:
        place = places[entry["image_id"]]
        objects[place] = np.count_nonzero(~np.asarray(entry["gtIgnore"], dtype=bool))
        score = np.asarray(entry["dtScores"], dtype=np.float64)
        if not len(score):
            continue
        scores.append(score)
        images.append(np.full(len(score), place, dtype=np.int32))
        found.append(np.asarray(entry["dtMatches"], dtype=np.float64) > 0)
        ignored.append(np.asarray(entry["dtIgnore"], dtype=bool))
    # As COCO's evaluation: of equal scores the first image's come first.
    order = np.argsort(-np.concatenate(scores), kind="stable")
    is_ignored = np.concatenate(ignored, axis=1)[:, order]
    return RankedMatches(
        np.concatenate(images)[order],
        np.concatenate(found, axis=1)[:, order] & ~is_ignored,
        is_ignored,
        objects,
    )


def average_precision(matches: RankedMatches, weights: np.ndarray) -> np.ndarray:
    """AP of one class in every resample.

    Where detections of one image and class have equal scores, those that find an object come first
    or last for all of the image's copies together.

    Args:
        matches: of the class.
        weights: (R, N) how many times each image is drawn.

    Returns:
        (R, T) in percent; NaN where the resample has no object of the class.
    """
    counted = ~matches.is_ignored.all(0)
    images = matches.images[counted]
    is_true, is_ignored = matches.is_true[:, counted], matches.is_ignored[:, counted]
    objects = weights @ matches.objects
    result = np.zeros((len(weights), len(is_true)))
    step = max(1, _MOST // max(1, len(images), matches.objects.max(initial=0)))
    for start in range(0, len(weights), step):
        rows = slice(start, start + step)
        result[rows] = _precision(weights[rows][:, images], is_true, is_ignored, objects[rows])
    result[objects == 0] = np.nan
    return result


def _precision(
    weights: np.ndarray, is_true: np.ndarray, is_ignored: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """(R, T) from the (R, D) weights of the detections and the (R,) numbers of objects.

    Between two true positives precision only falls and recall stays, so that true positives alone
    are looked at; and w copies of one have the precision of the last after the maximum over all
    that follows.
    """
    kept = weights.cumsum(1, dtype=np.int32)
    result = np.zeros((len(weights), len(is_true)))
    if not is_true.any():
        return result
    most = int((weights[:, is_true.any(0)]).sum(1).max())
    recall = np.arange(most + 1) / np.maximum(objects, 1)[:, None]
    # How many of the 101 levels of recall so many found objects reach.
    levels = np.searchsorted(_RECALL, recall, side="right").astype(np.int32)
    for t, (right, left_out) in enumerate(zip(is_true, is_ignored)):
        places = np.flatnonzero(right)
        if not len(places):
            continue
        found = weights[:, places].cumsum(1, dtype=np.int32)
        whole = kept[:, places]
        skipped = np.flatnonzero(left_out)
        if len(skipped):
            lost = np.pad(weights[:, skipped].cumsum(1), ((0, 0), (1, 0)))
            whole = whole - lost[:, np.searchsorted(skipped, places)]
        precision = found / (whole + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.take_along_axis(levels, found, axis=1)
        result[:, t] = (np.diff(reached, axis=1, prepend=0) * precision).sum(1)
    return 100 * result / len(_RECALL)


def resampled_precision(
    matches: Sequence[Sequence[RankedMatches]], weights: np.ndarray
) -> np.ndarray:
    """(R, K, A, T) AP in percent of all classes and sizes; NaN where there is no object.

    Args:
        matches: of :func:`collect_matches`.
        weights: (R, N) of :func:`draw_resamples`.
    """
    return np.stack(
        [np.stack([average_precision(m, weights) for m in row], axis=1) for row in matches], axis=1
    )
