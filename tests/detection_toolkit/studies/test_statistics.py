"""Means, spreads, paired differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detection_toolkit.studies.statistics import bootstrap_interval, summarise

AP = st.floats(0, 100, allow_nan=False)


def record(variant, seed, ap):
    return {
        "variant": variant,
        "seed": seed,
        "metrics": {"AP": ap},
        "stage_metrics": None,
        "seconds_per_step": 0.5,
        "cpu_minutes": 1.0,
        "minutes": 2.0,
        "starts": 1,
        "gpu_memory_mb": None,
        "peak_memory_mb": 700,
    }


@given(st.lists(AP, min_size=2, max_size=6))
def test_the_interval_holds_the_mean_and_stays_within_the_values(values):
    low, high = bootstrap_interval(values)
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9
    assert bootstrap_interval(values) == (low, high)


def test_one_value_has_no_interval():
    assert bootstrap_interval([3.0]) is None


def test_the_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_differences_are_of_the_seeds_that_both_have():
    records = [record("a", 1, 10.0), record("a", 2, 20.0), record("b", 2, 21.0)]
    records += [record("b", 3, 90.0), record("b", 1, None)]
    summary = summarise(records, ["a", "b"])
    (difference,) = summary["differences_of_AP"]
    assert difference["seeds"] == [2]
    assert (difference["mean"], difference["interval"]) == (1.0, None)
    assert summary["variants"]["b"]["AP"]["values"] == [None, 21.0, 90.0]
    assert summary["variants"]["b"]["AP"]["mean"] == 55.5
    assert summary["variants"]["a"]["faded"] == {"mean": None, "std": None, "values": [None, None]}
    assert summary["variants"]["a"]["AP_by_stage"] == []
    assert summary["variants"]["a"]["peak_memory_mb"]["mean"] == 700


def test_label_changes_are_those_of_the_assigners_that_were_compared():
    metrics = {
        "stages": [{"stage": 1, "AP": 30.0, "duplicates": 0.0}],
        "last_stage_after_nms": {"AP": 30.0},
        "score_changes": [{"faded": 0.1, "grown": 0.2}],
        "label_changes": {"own_match": {"share_of_labelled": 0.25}},
    }
    variant = summarise([{**record("a", 1, 30.0), "stage_metrics": metrics}], ["a"])["variants"][
        "a"
    ]
    assert variant["label_changes_own_match"]["values"] == [0.25]
    assert variant["label_changes_cross_stage"]["values"] == [None]


def test_what_an_interrupted_training_took_is_not_known():
    records = [record("a", 1, 10.0), {**record("a", 2, 20.0), "starts": 2, "cpu_minutes": 0.1}]
    variant = summarise(records, ["a"])["variants"]["a"]
    assert variant["cpu_minutes"]["values"] == [1.0, None]
    assert variant["minutes"]["mean"] == 2.0
    assert variant["AP"]["mean"] == 15.0


@given(st.lists(st.tuples(AP, AP), min_size=1, max_size=5))
def test_the_mean_difference_is_the_difference_of_the_means(pairs):
    records = []
    for seed, (a, b) in enumerate(pairs):
        records += [record("a", seed, a), record("b", seed, b)]
    summary = summarise(records, ["a", "b"])
    means = [summary["variants"][name]["AP"]["mean"] for name in "ab"]
    assert summary["differences_of_AP"][0]["mean"] == pytest.approx(means[1] - means[0], abs=1e-9)
