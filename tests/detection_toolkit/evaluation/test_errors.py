"""Kinds of errors on cases worked out by hand, and against TIDE's own implementation."""

import numpy as np
import pytest
from error_cases import make_mixed_case

from detection_toolkit.errors import MissingPackageError
from detection_toolkit.evaluation import errors
from detection_toolkit.evaluation.errors import ERRORS, analyze_errors

pytest.importorskip("hotcoco", minversion="1.2")


def make_truth(objects, num_images=1):
    """``objects``: (image, left edge, class, crowd) of squares of 10 pixels."""
    return {
        "images": [{"id": i} for i in range(1, num_images + 1)],
        "categories": [{"id": k, "name": str(k)} for k in (1, 2)],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": label,
                "bbox": [left, 0, 10, 10],
                "area": 100,
                "iscrowd": crowd,
            }
            for i, (image, left, label, crowd) in enumerate(objects, start=1)
        ],
    }


def make_results(*detections):
    """(image, left edge, class, score) each."""
    return [
        {"image_id": image, "category_id": label, "bbox": [left, 0, 10, 10], "score": score}
        for image, left, label, score in detections
    ]


@pytest.mark.parametrize(
    "left, label, kind",
    [
        (0, 1, None),
        (5, 1, "localisation"),  # IoU 1/3
        (1, 2, "classification"),
        (5, 2, "both"),
        (9.5, 1, "background"),  # IoU below 0.1
        (50, 1, "background"),
    ],
)
def test_one_detection_of_one_object(left, label, kind):
    analysis = analyze_errors(
        make_truth([(1, 0, 1, 0)]), make_results((1, left, label, 0.9)), threshold=0.3
    )
    expected = dict.fromkeys(ERRORS, 0)
    if kind is not None:
        expected[kind] = 1
    expected["missed"] = int(kind in ("both", "background"))
    assert analysis.counts == expected


def test_counts_and_confusion_are_of_detections_above_the_threshold():
    truth = make_truth([(1, 0, 1, 0), (1, 20, 1, 0), (2, 0, 2, 0), (2, 40, 2, 0)], num_images=3)
    results = make_results(
        (1, 0, 1, 0.9), (1, 20, 2, 0.8), (2, 0, 2, 0.7), (3, 0, 2, 0.2), (3, 1, 2, 0.1)
    )
    analysis = analyze_errors(truth, results, threshold=0.3)
    assert analysis.counts == {**dict.fromkeys(ERRORS, 0), "classification": 1, "missed": 1}
    assert analysis.confusion.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert analysis.gains["classification"] > 0 and analysis.gains["missed"] > 0
    assert analysis.gains["localisation"] == analysis.gains["duplicate"] == 0
    below = analyze_errors(truth, results, threshold=0.05)
    assert below.counts["background"] == 2 and below.confusion[2].tolist() == [0, 2, 0]


def test_detections_in_a_crowd_count_for_nothing():
    truth = make_truth([(1, 0, 1, 0), (1, 100, 1, 1)])
    results = make_results((1, 0, 1, 0.9), (1, 1, 1, 0.8), (1, 100, 1, 0.7), (1, 50, 1, 0.6))
    analysis = analyze_errors(truth, results, threshold=0.3)
    assert analysis.counts == {**dict.fromkeys(ERRORS, 0), "duplicate": 1, "background": 1}
    assert analysis.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [2, 0, 0]]


def test_more_than_a_hundred_detections_of_an_image_are_in_the_confusion():
    truth = make_truth([(1, 0, 1, 0)])
    results = make_results(*((1, 50, 1 + k % 2, 0.9) for k in range(120)), (1, 0, 1, 0.5))
    analysis = analyze_errors(truth, results, threshold=0.3)
    assert analysis.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [60, 60, 0]]


def test_no_detection_reaches_the_threshold():
    analysis = analyze_errors(
        make_truth([(1, 0, 1, 0)]), make_results((1, 0, 1, 0.1)), threshold=0.3
    )
    assert analysis.counts == {**dict.fromkeys(ERRORS, 0), "missed": 1}
    assert analysis.confusion.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_calibration_is_the_share_of_true_positives():
    results = make_results(*((1, left, 1, 0.75) for left in (0, 50, 70, 90)))
    analysis = analyze_errors(make_truth([(1, 0, 1, 0)]), results, threshold=0)
    assert analysis.calibration == [{"score": 0.75, "share": 0.25, "number": 4}]
    assert analysis.calibration_error == pytest.approx(0.5)


def test_gains_are_those_of_tide():
    """Printed by tidecv 1.0.1, whose AP is interpolated a little differently."""
    of_tide = {
        "classification": 9.354620932027544,
        "localisation": 12.639660474692967,
        "both": 1.6868902043471863,
        "duplicate": 0.9091514865265395,
        "background": 1.992744314695102,
        "missed": 9.082073093624253,
    }
    truth, results = make_mixed_case()
    analysis = analyze_errors(truth, results, threshold=0.3)
    assert analysis.ap50 == pytest.approx(52.86766996481963, abs=0.1)
    assert analysis.gains == pytest.approx(of_tide, abs=0.1)
    assert all(analysis.counts.values())


def test_nothing_that_is_given_is_changed():
    truth, results = make_mixed_case(num_images=3)
    expected = make_mixed_case(num_images=3)
    analyze_errors(truth, results, threshold=0.3)
    assert (truth, results) == expected
    assert np.isfinite(analyze_errors(truth, results, threshold=0.3).ap50)


@pytest.mark.parametrize("version", ["1.1.0", "0.9"])
def test_an_old_hotcoco_is_refused_by_name(monkeypatch, version):
    """Its figures for two kinds of errors are not TIDE's."""
    monkeypatch.setattr(errors.require_hotcoco(), "__version__", version)
    with pytest.raises(MissingPackageError, match=f"hotcoco {version} is too old: pip install"):
        analyze_errors(*make_mixed_case(num_images=1), threshold=0.3)
