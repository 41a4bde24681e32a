import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection_toolkit.structures import Assignment, GroundTruth, box_iou
from detection_toolkit.training import HungarianMatcher, StagewiseMatcher
from random_cases import random_predictions, random_truth
from stageinteractor import CrossStageMatcher


def literal_targets(assignment, boxes, truth, num_classes, threshold):
    """The definition, entry by entry."""
    num_stages, num_images, num_queries, _ = boxes.shape
    targets = torch.zeros(num_stages, num_images, num_queries, num_classes)
    for t in range(num_stages):
        listens_to = [k for k in range(num_stages) if k >= t - 1]
        for b in range(num_images):
            for q in range(num_queries):
                for k in listens_to:
                    obj = int(assignment.object_index[k, b, q])
                    if obj < 0:
                        continue
                    if box_iou(boxes[t, b, q], truth.boxes[b, obj]) >= threshold:
                        targets[t, b, q, truth.labels[b, obj]] = 1
    return targets


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 7), min_size=1, max_size=2),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.1, 0.3, 0.5]),
)
def test_targets_follow_the_definition(num_stages, counts, seed, threshold):
    logits, boxes = random_predictions(num_stages, len(counts), 5, 3, seed)
    truth = random_truth(counts, 3, seed)
    assignment = HungarianMatcher()(logits, boxes, truth)
    targets = CrossStageMatcher(threshold)(assignment, boxes, truth, num_classes=3).multi_hot
    assert torch.equal(targets, literal_targets(assignment, boxes, truth, 3, threshold))


def one_object(label=1):
    return GroundTruth.collate(
        [torch.tensor([[0.0, 0, 10, 10]])], [torch.tensor([label])], [(20, 20)]
    )


def test_a_label_is_added_and_another_removed():
    # Stage 0 matches query 0, stage 1 matches query 1; only query 1 covers the object.
    assignment = Assignment(torch.tensor([[[0, -1]], [[-1, 0]]]))
    away, over = [10.0, 10, 20, 20], [0.0, 0, 10, 10]
    boxes = torch.tensor([away, over]).expand(2, 1, 2, 4)
    targets = CrossStageMatcher()(assignment, boxes, one_object(), num_classes=2).multi_hot
    assert targets[0, 0].tolist() == [[0, 0], [0, 1]]  # lost by its own match, won by the other
    assert targets[1, 0].tolist() == [[0, 0], [0, 1]]


def test_stage_two_does_not_listen_to_stage_zero():
    assignment = Assignment(torch.tensor([[[0]], [[-1]], [[-1]]]))
    boxes = torch.tensor([0.0, 0, 10, 10]).expand(3, 1, 1, 4)
    targets = CrossStageMatcher()(assignment, boxes, one_object(), num_classes=2).multi_hot
    assert targets[:, 0, 0, 1].tolist() == [1, 1, 0]


def test_iou_of_exactly_one_half_counts():
    assignment = Assignment(torch.tensor([[[0]]]))
    half = torch.tensor([[[[0.0, 0, 10, 5]]]])
    assert (
        CrossStageMatcher(0.5)(assignment, half, one_object(), num_classes=2).multi_hot.sum() == 1
    )


def test_a_query_may_carry_two_labels():
    truth = GroundTruth.collate(
        [torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 9]])], [torch.tensor([0, 2])], [(20, 20)]
    )
    assignment = Assignment(torch.tensor([[[0]], [[1]]]))
    boxes = torch.tensor([0.0, 0, 10, 10]).expand(2, 1, 1, 4)
    targets = CrossStageMatcher()(assignment, boxes, truth, num_classes=3).multi_hot
    assert targets[0, 0, 0].tolist() == [1, 0, 1]


def test_own_scope_with_threshold_zero_is_the_baseline():
    logits, boxes = random_predictions(4, 2, 6, 5)
    truth = random_truth([3, 8], 5)  # the second image has more objects than queries
    assignment = HungarianMatcher()(logits, boxes, truth)
    own = CrossStageMatcher(0.0, stage_offsets=[[]] * 4)
    baseline = StagewiseMatcher()(assignment, boxes, truth, num_classes=5).multi_hot
    assert torch.equal(own(assignment, boxes, truth, num_classes=5).multi_hot, baseline)
    assert torch.equal(baseline.sum((1, 2, 3)), assignment.matched.sum((1, 2)).float())


def test_the_sources_of_a_label_are_the_stages_that_gave_it():
    # Stage 0 matches query 0, stage 1 matches query 1; only query 1 covers the object.
    assignment = Assignment(torch.tensor([[[0, -1]], [[-1, 0]]]))
    away, over = [10.0, 10, 20, 20], [0.0, 0, 10, 10]
    boxes = torch.tensor([away, over]).expand(2, 1, 2, 4)
    sources = CrossStageMatcher().sources(assignment, boxes, one_object())
    assert sources.shape == (2, 1, 2, 2) and sources.dtype == torch.bool
    assert sources.nonzero().tolist() == [[0, 0, 1, 1], [1, 0, 1, 1]]
    own = StagewiseMatcher().sources(assignment, boxes, one_object())
    assert own.nonzero().tolist() == [[0, 0, 0, 0], [1, 0, 1, 1]]


def test_offsets_for_another_number_of_stages_are_refused():
    matcher = CrossStageMatcher(stage_offsets=[[1], [-1]])
    with pytest.raises(ValueError, match="2 entries, but the decoder has 3 stages"):
        matcher.listens_to(3)


def test_the_released_scope():
    assert CrossStageMatcher().listens_to(3).tolist() == [
        [True, True, True],
        [True, True, True],
        [False, True, True],
    ]


def test_threshold_outside_of_zero_and_one_is_refused():
    with pytest.raises(ValueError, match="iou_threshold"):
        CrossStageMatcher(1.5)
