"""The paired bootstrap: AP of resamples is COCO's, differences that are there are found, and no
others."""

import json
import math
from statistics import NormalDist

import numpy as np
import pytest
from error_cases import make_mixed_case
from hypothesis import given, settings
from hypothesis import strategies as st

from detection_toolkit.evaluation.paired import (
    Resamples,
    compare_resamples,
    count_needed_images,
    judge_difference,
    summarize_pair,
)
from detection_toolkit.evaluation.resampling import (
    collect_matches,
    draw_resamples,
    resampled_precision,
)
from detection_toolkit.evaluation.results import run_coco


def crowded_case(seed):
    """As ``make_mixed_case``, with crowds, objects of all sizes, and detections within crowds."""
    rng = np.random.default_rng(seed)
    truth, results = make_mixed_case(num_images=8, seed=seed)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = int(rng.random() < 0.15)
        factor = rng.choice([0.5, 1.0, 4.0])
        annotation["area"] *= float(factor)
    for result in results:
        result["score"] = float(rng.random())  # no two are equal
    return truth, results


def document_of(truth, results, weights):
    """What a resample stands for: an image that was drawn w times stands w times."""
    images, annotations, found = [], [], []
    for image, weight in zip(truth["images"], weights):
        for _ in range(weight):
            number = len(images) + 1
            images.append({**image, "id": number})
            for entry in truth["annotations"]:
                if entry["image_id"] == image["id"]:
                    annotations.append({**entry, "id": len(annotations) + 1, "image_id": number})
            found += [{**r, "image_id": number} for r in results if r["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, found


def coco_means(evaluation):
    """AP by class and size; NaN where nothing is there."""
    precision = np.asarray(evaluation.eval["precision"])[..., -1]  # (T, R, K, A)
    precision = np.where(precision < 0, np.nan, precision)
    return 100 * precision.mean(1).transpose(1, 2, 0)  # (K, A, T)


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_ap_of_a_resample_is_that_of_a_document_with_copies(tmp_path, backend):
    if backend == "hotcoco":
        pytest.importorskip("hotcoco", minversion="1.2")
    seen = []
    for seed in range(4):
        truth, results = crowded_case(seed)
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps(truth))
        ids = [image["id"] for image in truth["images"]]
        matches = collect_matches(run_coco(str(path), results, backend), ids)
        weights = draw_resamples(len(ids), 6, seed=seed)
        weights[0] = 1
        ours = resampled_precision(matches, weights)
        for row, copies in zip(ours, weights):
            document, found = document_of(truth, results, copies)
            path.write_text(json.dumps(document))
            theirs = coco_means(run_coco(str(path), found, backend))
            np.testing.assert_allclose(row, theirs, rtol=1e-10, atol=1e-10)
            seen.append(theirs)
    assert np.isnan(seen).any() and np.nanstd(seen) > 5  # there was something to get wrong


def test_a_class_that_is_never_found_and_one_that_is_not_there(tmp_path):
    truth, results = make_mixed_case(num_images=6)
    truth["categories"].append({"id": 9, "name": "unicorn"})
    (tmp_path / "t.json").write_text(json.dumps(truth))
    results = [r for r in results if r["category_id"] != 2]
    drawn = Resamples(str(tmp_path / "t.json"), results, range(1, 7), count=20)
    assert not drawn.metric("AP", 1).any()
    assert np.isnan(drawn.metric("AP", 3)).all()
    assert np.isfinite(drawn.metric("AP")).all()
    summary = compare_resamples(drawn, drawn, ["cat", "dog", "bird", "unicorn"])
    assert summary["classes"][3] == {"class": "unicorn", "AP": None}


def test_metrics_of_the_images_as_they_are_are_those_of_coco(tmp_path):
    truth, results = crowded_case(1)
    for annotation in truth["annotations"][::3]:
        annotation["area"] = 100.0**2
    for i, result in enumerate(results):  # so that stricter IoU thresholds lose some
        x, y, width, height = result["bbox"]
        result["bbox"] = [x + i % 5, y, width, height]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    evaluation = run_coco(str(path), results, "pycocotools")
    evaluation.summarize()
    drawn = Resamples(str(path), results, [i["id"] for i in truth["images"]], count=3)
    expected = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), 100 * evaluation.stats[:6]))
    assert len(set(expected.values())) == 6 and min(expected.values()) > 0
    for name, value in expected.items():
        metric = drawn.metric(name)
        assert metric.shape == (4,) and metric[0] == pytest.approx(value)


def make_world(seed, num_images, hits):
    """Images of three objects of one class, found by each of two detectors with some chance.

    Args:
        seed: of all chances.
        num_images: N.
        hits: (chance of A, chance of B) to find an object.
    """
    rng = np.random.default_rng(seed)
    images, annotations, found = [], [], ([], [])
    for i in range(1, num_images + 1):
        images.append({"id": i, "file_name": f"{i}.png", "width": 100, "height": 100})
        for k in range(3):
            box = [30.0 * k, 10.0, 20.0, 20.0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1,
                    "bbox": box,
                    "area": 400.0,
                    "iscrowd": 0,
                }
            )
            for results, chance in zip(found, hits):
                place = box if rng.random() < chance else [30.0 * k, 60.0, 20.0, 20.0]
                score = float(rng.random())
                results.append({"image_id": i, "category_id": 1, "bbox": place, "score": score})
    categories = [{"id": 1, "name": "thing"}]
    return {"images": images, "annotations": annotations, "categories": categories}, found


def compare_world(folder, seed, num_images, hits, count=200):
    truth, found = make_world(seed, num_images, hits)
    (folder / "truth.json").write_text(json.dumps(truth))
    ids = range(1, num_images + 1)
    drawn = [Resamples(str(folder / "truth.json"), r, ids, count=count) for r in found]
    summary = compare_resamples(*drawn, ["thing"])["overall"]["AP"]
    return summary, judge_difference(summary, num_images)


def test_a_planted_difference_is_found_and_its_sign(tmp_path):
    for hits, better in (((0.5, 0.8), "B"), ((0.8, 0.5), "A")):
        summary, verdict = compare_world(tmp_path, 1, 80, hits)
        assert verdict == {"answer": better, "images_needed": None}
        assert (summary["difference"] > 0) == (better == "B")
        low, high = summary["interval"]
        assert low < summary["difference"] < high


@pytest.mark.slow
def test_equal_detectors_are_told_apart_about_as_often_as_stated(tmp_path):
    """One in twenty; of 60 trials with a rate of 5 % more than 9 are one in a thousand."""
    told = sum(
        compare_world(tmp_path, seed, 40, (0.6, 0.6))[1]["answer"] != "unknown"
        for seed in range(60)
    )
    assert told <= 9


def test_so_many_images_as_were_asked_for_do_tell(tmp_path):
    hits = (0.55, 0.68)
    summary, _ = compare_world(tmp_path, 3, 400, hits)  # close to what is true
    needed = count_needed_images(summary, 400)
    assert 30 < needed < 300
    told = [compare_world(tmp_path, s, needed, hits)[1]["answer"] for s in range(10, 20)]
    assert told.count("B") >= 5 and "A" not in told
    few, verdict = compare_world(tmp_path, 3, 20, (0.55, 0.58))
    assert verdict["answer"] == "unknown"
    assert verdict["images_needed"] == count_needed_images(few, 20) > 20


def test_the_same_twice_is_no_difference(tmp_path):
    truth, (found, _) = make_world(0, 10, (0.6, 0.6))
    (tmp_path / "t.json").write_text(json.dumps(truth))
    one, other = (Resamples(str(tmp_path / "t.json"), found, range(1, 11)) for _ in range(2))
    summary = compare_resamples(one, other, ["thing"])["overall"]["AP"]
    assert summary["difference"] == summary["error"] == 0 and summary["interval"] == [0, 0]
    assert summary["better"] == 0.5
    assert judge_difference(summary, 10) == {"answer": "same", "images_needed": None}


values = st.lists(st.integers(0, 100).map(float), min_size=30, max_size=30)


@settings(max_examples=25)
@given(values, values)
def test_the_other_way_round_all_signs_change(first, second):
    one, other = (np.array(x) for x in (first, second))
    there, back = summarize_pair(one, other), summarize_pair(other, one)
    assert there["difference"] == -back["difference"]
    assert there["interval"] == pytest.approx([-x for x in back["interval"][::-1]], abs=1e-9)
    assert there["better"] == pytest.approx(1 - back["better"])
    assert there["error"] == pytest.approx(back["error"])
    answers = [judge_difference(s, 100)["answer"] for s in (there, back)]
    assert answers[1] == {"A": "B", "B": "A"}.get(answers[0], answers[0])


def test_the_interval_holds_what_lies_between_the_fortieth_parts_at_both_ends():
    # Differences of the resamples, after that of the images as they are: 0, 1, ..., 200.
    second = np.concatenate([[7.0], np.arange(201.0)])
    summary = summarize_pair(np.zeros(202), second)
    assert summary["interval"] == pytest.approx([5, 195])
    assert (summary["A"], summary["B"], summary["difference"]) == (0, 7, 7)
    assert summary["better"] == pytest.approx((200 + 1 / 2) / 201)
    assert summary["error"] == pytest.approx(np.std(np.arange(201), ddof=1))


def test_resamples_without_the_class_tell_nothing():
    drawn = np.array([1.0, np.nan, 2.0, 3.0])
    summary = summarize_pair(np.zeros(4), drawn)
    assert summary["error"] == pytest.approx(np.std([2, 3], ddof=1)) and summary["better"] == 1
    for few in (drawn[:3], drawn[:2], drawn[:1]):
        summary = summarize_pair(np.zeros(len(few)), few)
        assert summary["difference"] == 1 and summary["interval"] is None
    undefined = np.array([np.nan, 1.0, 2.0])
    assert summarize_pair(undefined, np.ones(3)) is None
    assert summarize_pair(np.ones(3), undefined) is None


def test_a_million_images_are_out_of_reach():
    summary = {"difference": 1.0, "error": 1.0}
    # The limits of 95 % and of four fifths of the normal distribution.
    factor = (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) ** 2
    for count in (1000, 125_000):
        assert count_needed_images(summary, count) == math.ceil(count * factor)
    assert count_needed_images(summary, 130_000) is None
    assert count_needed_images({"difference": 0.0, "error": 1.0}, 10) is None


def test_resamples_are_of_whole_data_sets_and_repeat():
    weights = draw_resamples(50, 300, seed=4)
    assert (weights.sum(1) == 50).all() and weights.shape == (300, 50)
    np.testing.assert_array_equal(weights, draw_resamples(50, 300, seed=4))
    assert (weights != draw_resamples(50, 300, seed=5)).any()
    assert abs(weights.mean(0) - 1).max() < 0.25  # no image is drawn more often than others


def test_what_is_out_of_reach_is_not_promised():
    summary = {"difference": 1e-6, "error": 1.0, "interval": [-2.0, 2.0]}
    assert judge_difference(summary, 100) == {"answer": "unknown", "images_needed": None}
    summary["difference"] = 0.0
    assert judge_difference(summary, 100)["images_needed"] is None
