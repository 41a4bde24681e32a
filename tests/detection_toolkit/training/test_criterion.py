import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from detection_toolkit.structures import GroundTruth, StageOutput, generalized_box_iou
from detection_toolkit.training import Criterion, HungarianMatcher, StagewiseMatcher
from random_cases import random_predictions, random_truth
from stageinteractor import CrossStageMatcher

NUM_CLASSES = 4


def make_criterion(label_assigner=None):
    return Criterion(
        num_classes=NUM_CLASSES,
        matcher=HungarianMatcher(),
        label_assigner=label_assigner or CrossStageMatcher(),
    )


def make_outputs(num_images, seed=0, num_stages=3):
    logits, boxes = random_predictions(num_stages, num_images, 6, NUM_CLASSES, seed)
    logits.requires_grad_()
    boxes.requires_grad_()
    outputs = [StageOutput(x, y, y, x) for x, y in zip(logits.unbind(), boxes.unbind())]
    return outputs, logits, boxes


def total(result):
    return sum(result.as_dict().values())


def test_losses_are_the_normalised_sums_over_matched_queries():
    outputs, logits, boxes = make_outputs(2)
    truth = random_truth([3, 2], NUM_CLASSES)
    result = make_criterion(StagewiseMatcher())(outputs, truth)
    for t in range(3):
        l1 = giou = 0.0
        targets = torch.zeros(2, 6, NUM_CLASSES, dtype=logits.dtype)
        for b, q in result.assignment.matched[t].nonzero().tolist():
            obj = result.assignment.object_index[t, b, q]
            box, gt = boxes[t, b, q].detach(), truth.boxes[b, obj]
            l1 += ((box - gt).abs() / torch.tensor([100.0, 80, 100, 80])).sum()
            giou += 1 - generalized_box_iou(box, gt)
            targets[b, q, truth.labels[b, obj]] = 1
        focal = sigmoid_focal_loss(logits[t].detach(), targets, 0.25, 2.0).sum()
        torch.testing.assert_close(result.loss_cls[t].detach(), 2 * focal / 5)
        torch.testing.assert_close(result.loss_bbox[t].detach(), 5 * l1 / 5)
        torch.testing.assert_close(result.loss_giou[t].detach(), 2 * giou / 5)


def test_the_class_normaliser_is_the_larger_of_matches_and_ones():
    outputs, _, _ = make_outputs(2)
    truth = random_truth([3, 2], NUM_CLASSES)
    criterion = make_criterion(CrossStageMatcher(0.0))  # every gathered label stays
    result = criterion(outputs, truth)
    counts = criterion.count_targets(outputs, truth)
    assert torch.equal(result.box_normalizer, counts[:, 0])
    assert torch.equal(result.cls_normalizer, counts.amax(1))
    assert (counts[:, 1] > counts[:, 0]).any()


def test_an_empty_batch_has_the_same_losses_and_gradients_for_everything():
    outputs, logits, boxes = make_outputs(2)
    result = make_criterion()(outputs, random_truth([0, 0], NUM_CLASSES))
    with_objects = make_criterion()(outputs, random_truth([1, 0], NUM_CLASSES))
    assert result.as_dict().keys() == with_objects.as_dict().keys()
    assert (result.loss_cls > 0).all()
    assert torch.equal(result.loss_bbox, torch.zeros(3))
    assert torch.equal(result.loss_giou, torch.zeros(3))
    total(result).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0
    assert torch.equal(boxes.grad, torch.zeros_like(boxes))


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (9, 1)])
def test_micro_batches_with_summed_counts_add_up_to_the_whole_batch(counts):
    outputs, logits, boxes = make_outputs(2)
    truth = random_truth(counts, NUM_CLASSES)
    criterion = make_criterion()
    whole = total(criterion(outputs, truth))
    whole_grads = torch.autograd.grad(whole, [logits, boxes])

    def part(b):
        outputs_b = [
            StageOutput(o.logits[b : b + 1], o.boxes[b : b + 1], o.xyzr[b : b + 1], None)
            for o in outputs
        ]
        n = counts[b]
        truth_b = GroundTruth.collate([truth.boxes[b, :n]], [truth.labels[b, :n]], [(80, 100)])
        return outputs_b, truth_b

    target_counts = sum(criterion.count_targets(*part(b)) for b in range(2))
    parts = sum(total(criterion(*part(b), target_counts=target_counts)) for b in range(2))
    torch.testing.assert_close(parts, whole)
    for grad, expected in zip(torch.autograd.grad(parts, [logits, boxes]), whole_grads):
        torch.testing.assert_close(grad, expected)


def test_more_objects_than_queries_match_every_query():
    outputs, _, _ = make_outputs(1)
    result = make_criterion()(outputs, random_truth([11], NUM_CLASSES))
    assert result.assignment.matched.all()
    assert torch.isfinite(total(result))


def test_boxes_of_an_unmatched_query_get_no_gradient():
    outputs, _, boxes = make_outputs(1)
    result = make_criterion()(outputs, random_truth([2], NUM_CLASSES))
    total(result).backward()
    unmatched = ~result.assignment.matched
    assert torch.equal(boxes.grad[unmatched], torch.zeros_like(boxes.grad[unmatched]))
    assert (boxes.grad[result.assignment.matched].abs().sum(-1) > 0).all()


def test_half_precision_predictions_are_matched_and_scored_in_float32():
    outputs, _, _ = make_outputs(2)
    truth = random_truth([3, 2], NUM_CLASSES)
    half = [
        StageOutput(o.logits.bfloat16(), o.boxes.float(), o.xyzr.float(), None) for o in outputs
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = make_criterion()(half, truth)
    assert result.loss_cls.dtype == torch.float32
    expected = total(make_criterion()(outputs, truth)).float()
    torch.testing.assert_close(total(result), expected, rtol=0.02, atol=0)
