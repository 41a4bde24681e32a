"""What is wrong with a detector's answers: kinds of errors, confusion, calibration; by hotcoco.

The kinds of errors are TIDE's (Bolya et al., ECCV 2020). With its highest IoU with an object, a
detection that is no true positive at IoU 0.5 is

    localisation    same class, IoU in [0.1, 0.5)
    classification  another class, IoU >= 0.5
    duplicate       same class, IoU >= 0.5, but the object was found by a better detection
    background      IoU < 0.1 with every object
    both            anything else: another class and badly placed

and an object that neither a true positive nor one of the first two kinds refers to is missed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import MissingPackageError

__all__ = ["ERRORS", "ErrorAnalysis", "analyze_errors", "require_hotcoco"]

ERRORS = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}
"""Kinds of errors, and TIDE's names of them."""


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


def require_hotcoco() -> Any:
    """The module.

    Raises:
        MissingPackageError: it is not installed, or of a version before 1.2, whose figures for
            classification and localisation are not those of TIDE.
    """
    advice = "pip install 'hotcoco>=1.2'"
    try:
        hotcoco = importlib.import_module("hotcoco")
    except ImportError as error:
        raise MissingPackageError(f"hotcoco is not installed: {advice}") from error
    if tuple(map(int, hotcoco.__version__.split(".")[:2])) < (1, 2):
        raise MissingPackageError(f"hotcoco {hotcoco.__version__} is too old: {advice}")
    return hotcoco


def analyze_errors(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    threshold: float,
    max_dets: int = 100,
) -> ErrorAnalysis:
    """Kinds of errors, confusion of classes and calibration of all detections of a data set.

    Args:
        truth: a COCO document whose ids are whole numbers, from 1 on.
        results: detections in COCO's format.
        threshold: lowest score for the counts and the confusion matrix. AP50, its gains and the
            calibration look at all detections.
        max_dets: so many detections of an image and class count, the best ones.

    Raises:
        MissingPackageError: see :func:`require_hotcoco`.
    """
    hotcoco = require_hotcoco()
    objects = hotcoco.COCO(dict(truth))

    def evaluate(detections: list[dict[str, Any]]) -> Any:
        evaluation = hotcoco.COCOeval(objects, objects.loadRes(detections), "bbox")
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.evaluate()
        return evaluation

    everything = evaluate([dict(r) for r in results])
    kept = [dict(r) for r in results if r["score"] >= threshold]
    confident = evaluate(kept)
    # Detections in crowd regions count for nothing; the confusion matrix alone would count them.
    # The ids of detections are their places in the list, from 1 on.
    judged = confident.image_diagnostics()["dt_status"].keys()
    kept = [result for i, result in enumerate(kept, start=1) if i in judged]
    matrix = evaluate(kept).confusion_matrix(max_det=max(1, len(kept)))["matrix"]

    tide, calibration = everything.tide_errors(), everything.calibration()
    counts = confident.tide_errors()["counts"]
    return ErrorAnalysis(
        counts={kind: int(counts[name]) for kind, name in ERRORS.items()},
        ap50=100 * tide["ap_base"],
        gains={kind: 100 * tide["delta_ap"][name] for kind, name in ERRORS.items()},
        confusion=np.asarray(matrix).astype(int),
        calibration=[
            {"score": b["avg_confidence"], "share": b["avg_accuracy"], "number": b["count"]}
            for b in calibration["bins"]
            if b["count"]
        ],
        calibration_error=calibration["ece"],
    )
