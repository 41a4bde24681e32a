"""Precision, recall and F1 over thresholds, worked out by hand; and the images at one of them."""

import io
import math
from contextlib import redirect_stdout

import numpy as np
import pytest
from error_cases import make_mixed_case
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection_toolkit.evaluation.thresholds import (
    ImageErrors,
    Matches,
    judge_images,
    match_by_class,
    sample_thresholds,
    summarize_images,
    sweep_thresholds,
)


def make_matches(image_id, scores, is_true, objects, class_id=1):
    return Matches(image_id, class_id, np.array(scores, float), np.array(is_true, bool), objects)


# Four objects. From the best detection down: right, wrong, right, (right, wrong) of equal scores.
BY_HAND = [
    make_matches(1, [0.9, 0.6], [True, True], 3),
    make_matches(2, [0.8, 0.5, 0.5], [False, True, False], 1),
]


def test_precision_recall_and_f1_at_each_threshold():
    curve = sweep_thresholds(BY_HAND)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.6, 0.5]
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 5])
    assert curve.recall.tolist() == pytest.approx([1 / 4, 1 / 4, 2 / 4, 3 / 4])
    assert curve.f1.tolist() == pytest.approx([2 / 5, 2 / 6, 4 / 7, 6 / 9])
    assert curve.best == 3


def test_of_equal_f1_the_higher_threshold_is_the_best():
    curve = sweep_thresholds([make_matches(1, [0.9, 0.7, 0.4, 0.2], [1, 1, 0, 1], 3)])
    assert curve.f1.tolist() == pytest.approx([2 / 4, 4 / 5, 4 / 6, 6 / 7])
    assert curve.best == 3
    curve = sweep_thresholds([make_matches(1, [0.9, 0.5, 0.4], [1, 0, 0], 1)])
    assert curve.best == 0
    curve = sweep_thresholds([make_matches(1, [0.9, 0.8, 0.7, 0.6], [1, 0, 0, 1], 2)])
    assert curve.f1.tolist() == pytest.approx([2 / 3, 2 / 4, 2 / 5, 4 / 6])
    assert curve.best == 0


def test_without_detections_or_objects_there_is_no_best_threshold():
    assert sweep_thresholds([]).best is None
    assert sweep_thresholds([make_matches(1, [], [], 2)]).best is None
    curve = sweep_thresholds([make_matches(1, [0.7], [False], 0)])
    assert curve.best is None and curve.precision.tolist() == [0]
    assert math.isnan(curve.recall[0]) and math.isnan(curve.f1[0])


def test_samples_hold_from_a_threshold_down_to_the_next():
    sampled = sample_thresholds(BY_HAND)
    at = {t: i for i, t in enumerate(np.round(sampled["threshold"], 2))}
    assert len(at) == 101 and (at[0.0], at[1.0]) == (0, 100)

    def values(threshold):
        return [sampled[name][at[threshold]] for name in ("precision", "recall", "f1")]

    assert values(0.95) == [None, 0, 0]
    assert values(0.85) == pytest.approx([1, 1 / 4, 2 / 5])
    assert values(0.55) == pytest.approx([2 / 3, 2 / 4, 4 / 7])
    assert values(0.0) == pytest.approx([3 / 5, 3 / 4, 6 / 9])
    empty = sample_thresholds([make_matches(1, [0.7], [False], 0)])
    assert set(empty["f1"]) == {None} and set(empty["precision"]) == {None, 0.0}


def test_images_at_a_threshold_and_the_best_and_worst_of_them():
    images = judge_images(BY_HAND, [1, 2, 3], threshold=0.55)
    assert [tuple(e)[:4] for e in images] == [(1, 2, 0, 1), (2, 0, 1, 1), (3, 0, 0, 0)]
    assert [e.f1 for e in images] == pytest.approx([4 / 5, 0, 1])
    chosen = summarize_images(images, 1)
    assert [e["image_id"] for e in chosen["worst"]] == [2]
    assert [e["image_id"] for e in chosen["best"]] == [1]


def test_a_detection_is_kept_at_its_own_score():
    curve = sweep_thresholds(BY_HAND)
    for threshold, recall in zip(curve.thresholds, curve.recall):
        images = judge_images(BY_HAND, [1, 2], threshold=threshold)
        assert sum(e.true_positives for e in images) / 4 == recall


def test_among_images_of_equal_f1_more_errors_are_worse_and_more_found_is_better():
    def chosen(images, count=5):
        summary = summarize_images(images, count)
        return [[e["image_id"] for e in summary[name]] for name in ("worst", "best")]

    missed, wrong = ImageErrors(1, 0, 0, 1, 0.0), ImageErrors(2, 0, 1, 2, 0.0)
    half, right, empty = (
        ImageErrors(3, 1, 1, 1, 0.5),
        ImageErrors(4, 3, 0, 0, 1.0),
        ImageErrors(5, 0, 0, 0, 1.0),
    )
    one = ImageErrors(6, 1, 0, 0, 1.0)
    images = [one, empty, right, half, wrong, missed]
    assert chosen(images) == [[2, 1, 3], [4, 6]]  # none is both, and nothing found is not best
    assert chosen(images, 2) == [[2, 1], [4, 6]]
    assert chosen(images, 1) == [[2], [4]]


def test_matches_are_those_of_coco():
    truth, results = make_mixed_case()
    crowd = {**truth["annotations"][0], "id": len(truth["annotations"]) + 1, "iscrowd": 1}
    crowd["bbox"] = [90, 90, 20, 20]  # where nothing else is
    truth["annotations"].append(crowd)
    results += [{**results[0], "image_id": crowd["image_id"], "bbox": [90, 90, 20, 20]}] * 2
    for result in results[-2:]:
        result["category_id"] = crowd["category_id"]
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(r) for r in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    matches = match_by_class(evaluation)
    assert len({(m.image_id, m.class_id) for m in matches}) == len(matches)  # of all sizes, once
    assert sum(len(m.scores) for m in matches) == len(results) - 2  # in the crowd
    assert sum(m.objects for m in matches) == len(truth["annotations"]) - 1
    for index, class_id in enumerate(evaluation.params.catIds):
        curve = sweep_thresholds([m for m in matches if m.class_id == class_id])
        recall = evaluation.eval["recall"][0, index, 0, -1]
        assert curve.recall[-1] == pytest.approx(recall)
        # COCO's precision at a recall is the best one from there on.
        precision = evaluation.eval["precision"][0, :, index, 0, -1]
        for place, wanted in enumerate(evaluation.params.recThrs):
            reached = curve.precision[curve.recall >= wanted]
            assert precision[place] == pytest.approx(reached.max() if len(reached) else 0)
