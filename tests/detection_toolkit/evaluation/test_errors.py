"""Kinds of errors on cases worked out by hand; AP50 is COCO's; fixing everything fixes it."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection_toolkit.evaluation.errors import (
    ERRORS,
    analyze_errors,
    judge_image,
    summarize_images,
)


def squares(*left_edges):
    return torch.tensor([[x, 0.0, x + 10.0, 10.0] for x in left_edges]).reshape(-1, 4)


def labels(*classes):
    return torch.tensor(classes, dtype=torch.long)


def judge(found, classes, truth, truth_classes, scores=None, crowd=None):
    scores = torch.linspace(0.9, 0.4, len(found)) if scores is None else torch.tensor(scores)
    crowd = torch.zeros(len(truth), dtype=torch.bool) if crowd is None else torch.tensor(crowd)
    return judge_image(
        squares(*found), scores, labels(*classes), squares(*truth), labels(*truth_classes), crowd
    )


@pytest.mark.parametrize(
    "position, label, kind",
    [
        (0, 0, "true"),
        (5, 0, "localisation"),  # IoU 1/3
        (1, 1, "classification"),
        (5, 1, "both"),
        (9.5, 0, "background"),  # IoU below 0.1
        (50, 0, "background"),
    ],
)
def test_one_detection_of_one_object(position, label, kind):
    judged = judge([position], [label], [0], [0])
    assert judged.kinds == [kind]
    assert judged.missed.tolist() == [kind in ("both", "background")]


def test_a_second_detection_is_a_duplicate_and_a_crowd_is_ignored():
    judged = judge([0, 1, 100, 50], [0, 0, 0, 0], [0, 100], [0, 0], crowd=[False, True])
    assert judged.kinds == ["true", "duplicate", "ignored", "background"]
    assert judged.duplicates.tolist() == [False, True, False, False]
    assert len(judged.truth_classes) == 1


def test_counts_confusion_and_gains():
    images = [
        (1, judge([0, 20], [0, 1], [0, 20], [0, 0])),  # one right, one of the wrong class
        (2, judge([0], [1], [0, 40], [1, 1])),  # one right, one missed
        (3, judge([0, 1], [1, 1], [], [], scores=[0.2, 0.1])),  # below the threshold
    ]
    analysis = analyze_errors(images, num_classes=2, threshold=0.3)
    assert analysis.counts == {**dict.fromkeys(ERRORS, 0), "classification": 1, "missed": 1}
    assert analysis.confusion.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert analysis.gains["classification"] > 0 and analysis.gains["missed"] > 0
    assert analysis.gains["localisation"] == analysis.gains["duplicate"] == 0
    assert [round(e.f1, 3) for e in analysis.images] == [0.5, 0.667, 1.0]
    chosen = summarize_images(analysis, 1)
    assert [e["image_id"] for e in chosen["worst"]] == [1]
    assert [e["image_id"] for e in chosen["best"]] == [2]


def test_calibration_is_the_share_of_true_positives():
    judged = judge([0, 50, 70, 90], [0] * 4, [0], [0], scores=[0.75] * 4)
    analysis = analyze_errors([(1, judged)], num_classes=1, threshold=0)
    assert analysis.calibration == [{"score": 0.75, "share": 0.25, "number": 4}]
    assert analysis.calibration_error == pytest.approx(0.5)


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1))
def test_ap50_is_that_of_coco(seed):
    rng = np.random.default_rng(seed)
    document = {"info": {}, "images": [], "annotations": [], "categories": []}
    document["categories"] = [{"id": k, "name": str(k)} for k in range(3)]
    results, judged = [], []
    for image_id in range(1, 5):
        document["images"].append({"id": image_id, "width": 40, "height": 40})
        # Fractions, so that no two objects overlap a detection equally.
        truth, found = (
            [(float(x), int(k)) for x, k in zip(rng.uniform(0, 25, n), rng.integers(0, 3, n))]
            for n in (4, 6)
        )
        scores = rng.permutation(np.linspace(0.1, 0.9, 6)) + image_id * 1e-3
        for x, k in truth:
            entry = {"id": len(document["annotations"]) + 1, "image_id": image_id}
            box = {"bbox": [x, 0, 10, 10], "area": 100, "category_id": k, "iscrowd": 0}
            document["annotations"].append({**entry, **box})
        for (x, k), score in zip(found, scores):
            box = {"bbox": [x, 0, 10, 10], "category_id": k}
            results.append({"image_id": image_id, "score": float(score), **box})
        both = [list(part) for pairs in (found, truth) for part in zip(*pairs)]
        judged.append((image_id, judge(*both, scores=scores.tolist())))
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = document
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    analysis = analyze_errors(judged, num_classes=3, threshold=0)
    assert analysis.ap50 == pytest.approx(100 * evaluation.stats[1], abs=1e-6)
    assert all(gain >= -1e-9 for name, gain in analysis.gains.items() if name != "missed")
