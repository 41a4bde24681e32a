import pytest
import torch
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from detection_toolkit.errors import UserError
from detection_toolkit.structures import (
    Assignment,
    Branch,
    HeadOutput,
    Predictions,
    generalized_box_iou,
)
from detection_toolkit.training import (
    BranchedCriterion,
    Criterion,
    HungarianMatcher,
    LabelNormalizer,
    MatchNormalizer,
    StagewiseMatcher,
)
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
    outputs = [HeadOutput(x, y) for x, y in zip(logits.unbind(), boxes.unbind())]
    return Predictions(outputs), logits, boxes


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


@pytest.mark.parametrize("repeats", [1, 2, 4])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (11, 1)])
def test_counts_that_the_truth_alone_decides(counts, repeats):
    outputs, logits, _ = make_outputs(2)
    truth = random_truth(counts, NUM_CLASSES)
    criterion = make_criterion(StagewiseMatcher())
    criterion.matcher = HungarianMatcher(repeats=repeats)
    sizes = dict(num_stages=logits.shape[0], num_queries=logits.shape[2])
    known = criterion.targets_of_truth(truth, **sizes)
    assert (
        torch.tensor(known)[:, None]
        .expand(-1, 2)
        .equal(criterion.count_targets(outputs, truth).long())
    )
    assert make_criterion(CrossStageMatcher()).targets_of_truth(truth, **sizes) is None
    criterion.matcher = nn.Identity()  # one that does not say what it will match
    assert criterion.targets_of_truth(truth, **sizes) is None


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
    half = Predictions([HeadOutput(o.logits.bfloat16(), o.boxes.float()) for o in outputs.stages])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = make_criterion()(half, truth)
    assert result.loss_cls.dtype == torch.float32
    expected = total(make_criterion()(outputs, truth)).float()
    torch.testing.assert_close(total(result), expected, rtol=0.02, atol=0)


def branched(**branches):
    return BranchedCriterion(make_criterion(), {k: make_criterion(v) for k, v in branches.items()})


def test_branches_have_the_losses_that_they_have_alone():
    stages, *_ = make_outputs(2)
    encoder, *_ = make_outputs(2, seed=1, num_stages=1)
    truth = random_truth([3, 2], NUM_CLASSES)
    predictions = Predictions(stages.stages, (Branch("encoder", encoder.stages),))
    criterion = branched(encoder=StagewiseMatcher())
    losses = criterion(predictions, truth).as_dict()
    alone = make_criterion()(stages, truth).as_dict()
    alone |= make_criterion(StagewiseMatcher())(encoder, truth).as_dict("encoder")
    assert losses.keys() == alone.keys() and "loss_giou_encoder_stage0" in losses
    for name, value in alone.items():
        torch.testing.assert_close(losses[name], value)
    assert criterion.count_targets(predictions, truth).shape == (4, 2)


def test_a_branch_may_bring_its_assignment_and_may_be_empty():
    stages, *_ = make_outputs(2)
    truth = random_truth([3, 2], NUM_CLASSES)
    given = Assignment(torch.full((3, 2, 6), -1))
    given.object_index[:, :, 4] = 1  # what no matcher would choose for all stages
    criterion = branched(denoising=StagewiseMatcher())
    result = criterion(
        Predictions(stages.stages, (Branch("denoising", stages.stages, given),)), truth
    )
    assert torch.equal(result.branches["denoising"].assignment.object_index, given.object_index)

    leaf = torch.zeros(2, 0, NUM_CLASSES, requires_grad=True)
    nothing = [HeadOutput(leaf, leaf[..., :4])] * 3
    nobody = Assignment(torch.zeros(3, 2, 0, dtype=torch.long))
    empty = criterion(
        Predictions(stages.stages, (Branch("denoising", nothing, nobody),)), truth
    ).as_dict()
    assert empty.keys() == result.as_dict().keys()
    assert sum(float(v) for k, v in empty.items() if "denoising" in k) == 0.0
    sum(empty.values()).backward()
    assert leaf.grad is not None


def test_a_branch_without_a_criterion_is_named():
    stages, *_ = make_outputs(1)
    predictions = Predictions(stages.stages, (Branch("dense", stages.stages),))
    with pytest.raises(
        UserError, match=r"\['dense'\], but model.criterion.branches .* \['encoder'\]"
    ):
        branched(encoder=StagewiseMatcher())(predictions, random_truth([1], NUM_CLASSES))


def test_normalisers():
    matched, labels = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 1.0])
    assert [x.tolist() for x in LabelNormalizer()(matched, labels)] == [[4.0, 3.0], [2.0, 3.0]]
    assert [x.tolist() for x in MatchNormalizer()(matched, labels)] == [[2.0, 3.0], [2.0, 3.0]]
