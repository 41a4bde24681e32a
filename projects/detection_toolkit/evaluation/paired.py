"""Is one detector better than another on the same images? A paired bootstrap over the images.

Both are judged on the same resamples, so that images that are hard for both do not blur what lies
between them. The answer is about images: what another run of the same recipe, with another seed,
would give is not in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from .resampling import collect_matches, draw_resamples, resampled_precision
from .results import METRICS, run_coco

__all__ = [
    "CONFIDENCE",
    "FEW_IMAGES",
    "Resamples",
    "compare_resamples",
    "count_needed_images",
    "judge_difference",
    "summarize_pair",
]

CONFIDENCE = 0.95
FEW_IMAGES = 20
"""Of fewer, resamples know too little of what other images are like."""

# What a difference must be in standard errors so that four of five test sets show it: the limit
# of the interval, and the four fifths, of the normal distribution.
_TOLD = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) + NormalDist().inv_cdf(4 / 5)
_TOO_MANY = 1_000_000


class Resamples:
    """AP of one detector in every resample, and on the images themselves."""

    def __init__(
        self,
        truth_file: str,
        results: list[dict],
        image_ids: Sequence[Any],
        *,
        count: int = 1000,
        seed: int = 0,
        max_dets: int = 100,
    ):
        """
        Args:
            truth_file, results, max_dets: see :func:`.results.run_coco`.
            image_ids: of all images.
            count: of resamples.
            seed: of what is drawn: with the same one, the same images.
        """
        # hotcoco is faster at finding matches, and much slower at handing them out.
        evaluation = run_coco(truth_file, results, "pycocotools", max_dets=max_dets)
        weights = draw_resamples(len(image_ids), count, seed=seed)
        weights = np.concatenate([np.ones_like(weights[:1]), weights])
        self.evaluation = evaluation
        # First the images as they are.
        self.precision = resampled_precision(collect_matches(evaluation, image_ids), weights)
        """(1 + R, K, A, T)"""

    def metric(self, name: str, k: int | None = None) -> np.ndarray:
        """(1 + R,) one of COCO's metrics; NaN where it is not defined.

        Args:
            name: one of ``METRICS``.
            k: index of a class; None: the mean over all.
        """
        values = self.precision if k is None else self.precision[:, k : k + 1]
        size = {"APs": 1, "APm": 2, "APl": 3}.get(name, 0)
        values = values[:, :, size]
        threshold = {"AP50": 0, "AP75": 5}.get(name)
        if threshold is not None:
            values = values[..., threshold]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing is NaN
            return np.nanmean(values.reshape(len(values), -1), axis=1)


def summarize_pair(first: np.ndarray, second: np.ndarray) -> dict[str, Any] | None:
    """A metric of two detectors, and what lies between them.

    Args:
        first, second: (1 + R,) of :meth:`Resamples.metric`.

    Returns:
        "A" and "B" on the images as they are, "difference" B - A, "interval" that holds 95 % of the
        resamples, "better": the share of resamples in which B is, those without a difference half;
        "error": the standard error. None where the metric is not defined.
    """
    if not (math.isfinite(first[0]) and math.isfinite(second[0])):
        return None
    drawn = second[1:] - first[1:]
    drawn = drawn[np.isfinite(drawn)]  # a resample may lack all objects of a class
    summary: dict[str, Any] = {
        "A": float(first[0]),
        "B": float(second[0]),
        "difference": float(second[0] - first[0]),
        "interval": None,
        "better": None,
        "error": None,
    }
    if len(drawn) > 1:
        tail = 100 * (1 - CONFIDENCE) / 2
        summary["interval"] = [float(x) for x in np.percentile(drawn, [tail, 100 - tail])]
        summary["better"] = float((drawn > 0).mean() + (drawn == 0).mean() / 2)
        summary["error"] = float(drawn.std(ddof=1))
    return summary


def count_needed_images(summary: dict[str, Any], num_images: int) -> int | None:
    """So many images like these would tell, four times in five, were the difference the true one.

    Args:
        summary: of :func:`summarize_pair`, with an interval.
        num_images: N, that it is of.

    Returns:
        the number; None where it is out of reach.
    """
    if not summary["difference"]:
        return None
    needed = num_images * (_TOLD * summary["error"] / summary["difference"]) ** 2
    return math.ceil(needed) if needed <= _TOO_MANY else None


def judge_difference(summary: dict[str, Any], num_images: int) -> dict[str, Any]:
    """What can be said of a difference.

    Args:
        summary: of :func:`summarize_pair`, with an interval.
        num_images: N.

    Returns:
        "answer": "B", "A" (that one is better), "unknown", or "same" (no difference in any
        resample); "images_needed": see :func:`count_needed_images`; None also where it is known.
    """
    low, high = summary["interval"]
    if summary["difference"] == summary["error"] == 0:
        return {"answer": "same", "images_needed": None}
    if low > 0 or high < 0:
        return {"answer": "B" if low > 0 else "A", "images_needed": None}
    needed = count_needed_images(summary, num_images)
    # More than there are: these did not tell.
    return {
        "answer": "unknown",
        "images_needed": None if needed is None else max(num_images + 1, needed),
    }


def compare_resamples(a: Resamples, b: Resamples, class_names: Sequence[str]) -> dict[str, Any]:
    """All metrics of two detectors.

    Args:
        a, b: of the same resamples of the same images.
        class_names: K.

    Returns:
        "overall": metric -> :func:`summarize_pair`; "classes": for each class its name, and the
        same of its AP; "resampled": differences of AP, B - A, of all resamples.
    """
    drawn = b.metric("AP")[1:] - a.metric("AP")[1:]
    return {
        "overall": {name: summarize_pair(a.metric(name), b.metric(name)) for name in METRICS},
        "classes": [
            {"class": name, "AP": summarize_pair(a.metric("AP", k), b.metric("AP", k))}
            for k, name in enumerate(class_names)
        ],
        "resampled": drawn[np.isfinite(drawn)].tolist(),
    }
