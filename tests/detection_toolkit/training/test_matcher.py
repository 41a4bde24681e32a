import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from detection_toolkit.errors import NonFinitePredictionError, UserError
from detection_toolkit.structures import GroundTruth
from detection_toolkit.structures.boxes import cxcywh_norm
from detection_toolkit.training import HungarianMatcher, matcher
from random_cases import random_predictions, random_truth


def test_predictions_equal_to_the_objects_are_matched_to_them():
    truth = random_truth([4], num_classes=3)
    logits = torch.full((1, 1, 4, 3), -5.0).scatter(3, truth.labels[None, ..., None], 5.0)
    order = torch.tensor([2, 0, 3, 1])
    assignment = HungarianMatcher()(logits[:, :, order], truth.boxes[None][:, :, order], truth)
    assert assignment.object_index[0, 0].tolist() == order.tolist()


def test_a_hand_made_case():
    # Two objects left and right; query 1 covers the left one, query 2 the right one.
    truth = GroundTruth.collate(
        [torch.tensor([[0.0, 0, 10, 10], [50.0, 0, 60, 10]])], [torch.tensor([0, 0])], [(20, 100)]
    )
    boxes = torch.tensor([[20.0, 10, 30, 20], [0.0, 0, 10, 11], [51.0, 0, 60, 10]])
    assignment = HungarianMatcher()(torch.zeros(1, 1, 3, 1), boxes[None, None], truth)
    assert assignment.object_index[0, 0].tolist() == [-1, 0, 1]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 99))
def test_matches_are_one_to_one_and_of_least_cost(counts, num_queries, seed):
    logits, boxes = random_predictions(2, len(counts), num_queries, 4, seed)
    truth = random_truth(counts, 4, seed)
    matcher = HungarianMatcher()
    index = matcher(logits, boxes, truth).object_index
    total = matcher.cost(logits, boxes, truth).total
    for s, b in itertools.product(range(2), range(len(counts))):
        matched = index[s, b][index[s, b] >= 0]
        assert len(matched) == min(num_queries, counts[b]) == len(matched.unique())
        cost = total[s, b, :, : counts[b]].numpy()
        rows, columns = linear_sum_assignment(cost)
        queries = (index[s, b] >= 0).nonzero()[:, 0]
        # Absolute, as positive and negative costs may cancel.
        assert cost[queries, matched].sum() == pytest.approx(cost[rows, columns].sum(), abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(6)), st.integers(0, 99))
def test_permuting_the_queries_permutes_the_matches(order, seed):
    logits, boxes = random_predictions(1, 1, 6, 4, seed)
    truth = random_truth([3], 4, seed)
    plain = HungarianMatcher()(logits, boxes, truth).object_index
    permuted = HungarianMatcher()(logits[:, :, order], boxes[:, :, order], truth).object_index
    assert permuted[0, 0].tolist() == plain[0, 0, order].tolist()


def test_an_image_alone_is_matched_as_in_a_batch():
    logits, boxes = random_predictions(3, 2, 7, 5)
    truth = random_truth([5, 2], 5)
    together = HungarianMatcher()(logits, boxes, truth).object_index
    for b, count in enumerate(truth.num_objects):
        alone = GroundTruth.collate(
            [truth.boxes[b, :count]], [truth.labels[b, :count]], [(80, 100)]
        )
        index = HungarianMatcher()(logits[:, b : b + 1], boxes[:, b : b + 1], alone).object_index
        assert torch.equal(index[:, 0], together[:, b])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_named(value):
    logits, boxes = random_predictions(3, 2, 4, 5)
    logits[1, 1] = float("nan")
    boxes[2, 0, 3, 2] = value
    with pytest.raises(NonFinitePredictionError, match="stage 1 of image 1") as error:
        HungarianMatcher()(logits, boxes, random_truth([2, 2], 5))
    assert error.value.where == [(1, 1), (2, 0)]


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        HungarianMatcher(class_weight=-1.0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_an_object_is_matched_to_k_queries_as_far_as_there_are(count, num_queries, k, seed):
    logits, boxes = random_predictions(2, 1, num_queries, 4, seed)
    truth = random_truth([count], 4, seed)
    index = HungarianMatcher(repeats=[k, 1])(logits, boxes, truth).object_index
    copies = max(1, min(k, num_queries // max(count, 1)))
    matched = index[0, 0][index[0, 0] >= 0]
    assert len(matched) == min(num_queries, copies * count)
    assert matched.bincount(minlength=1).max() <= copies
    # The repeated objects are matched at least cost.
    cost = HungarianMatcher().cost(logits, boxes, truth).total[0, 0, :, :count].numpy()
    repeated = cost.repeat(copies, axis=1)
    rows, columns = linear_sum_assignment(repeated)
    queries = (index[0, 0] >= 0).nonzero()[:, 0]
    least = repeated[rows, columns].sum()
    assert cost[queries, matched].sum() == pytest.approx(least, rel=1e-5, abs=1e-6)
    assert torch.equal(index[1], HungarianMatcher()(logits, boxes, truth).object_index[1])
    counts = HungarianMatcher(repeats=[k, 1]).count_matches(
        truth.num_objects, num_stages=2, num_queries=num_queries
    )
    assert counts == (index >= 0).sum((1, 2)).tolist()


def test_repeats_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        HungarianMatcher(repeats=0)
    logits, boxes = random_predictions(2, 1, 4, 4)
    with pytest.raises(UserError, match="repeats for 3 stages, the predictions are of 2"):
        HungarianMatcher(repeats=[1, 1, 2])(logits, boxes, random_truth([1], 4))


def test_the_parts_of_the_cost_can_be_others():
    logits, boxes = random_predictions(1, 2, 5, 4)
    truth = random_truth([3, 2], 4)
    matcher = HungarianMatcher(class_cost=lambda x: -x.sigmoid(), box_code=cxcywh_norm)
    cost = matcher.cost(logits, boxes, truth)
    for b, n, m in ((0, 1, 2), (1, 4, 0)):
        label = truth.labels[b, m]
        torch.testing.assert_close(
            cost.classification[0, b, n, m], -logits[0, b, n, label].sigmoid()
        )
        size = truth.image_sizes[b]
        distance = cxcywh_norm(boxes[0, b, n], size) - cxcywh_norm(truth.boxes[b, m], size)
        torch.testing.assert_close(cost.l1[0, b, n, m], distance.abs().sum())


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize(("num_queries", "count"), [(3, 9), (9, 3), (5, 5), (1, 4), (4, 1)])
def test_one_cost_at_a_time_is_matched_as_scipy_does(weights, num_queries, count):
    logits, boxes = random_predictions(1, 1, num_queries, 4, seed=3)
    truth = random_truth([count], 4, seed=4)
    matcher = HungarianMatcher(*map(float, weights))
    index = matcher(logits, boxes, truth).object_index[0, 0]
    cost = matcher.cost(logits, boxes, truth)
    term = (cost.classification, cost.l1, cost.giou)[weights.index(1)]
    rows, columns = linear_sum_assignment(term[0, 0].numpy())
    assert torch.equal(cost.total, term)
    assert index[rows].tolist() == columns.tolist()
    assert int((index >= 0).sum()) == min(num_queries, count)


def test_threads_give_the_same_matches(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 30, 5, generator=generator)
    corner = torch.rand(3, 4, 30, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 20], -1)
    truth = GroundTruth.collate(
        [boxes[0, b, : 2 * b] + 1 for b in range(4)],
        [torch.arange(2 * b) % 5 for b in range(4)],
        [(80, 80)] * 4,
    )
    plain = HungarianMatcher()(logits, boxes, truth)
    monkeypatch.setattr(matcher, "_WORTH_THREADS", 0)
    assert torch.equal(HungarianMatcher()(logits, boxes, truth).object_index, plain.object_index)
    boxes[1, 3, 0] = math.nan
    boxes[2, 2, 0] = math.nan
    with pytest.raises(NonFinitePredictionError) as caught:
        HungarianMatcher()(logits, boxes, truth)
    assert caught.value.where == [(1, 3), (2, 2)]
