"""Supervision of groups: own matching and normaliser each, labels along the group's path."""

from __future__ import annotations

import pytest
import torch
from small_runs import make_batch
from sqr_models import NUM_STAGES, losses_and_gradients, make_plain, with_recollection

from detection_toolkit.errors import NonFinitePredictionError
from detection_toolkit.structures import Branch, GroundTruth, HeadOutput, Predictions, box_iou
from detection_toolkit.training import (
    BranchedCriterion,
    Criterion,
    HungarianMatcher,
    StagewiseMatcher,
)
from random_cases import random_predictions, random_truth
from sqr import (
    PathLabelAssigner,
    RecollectionCriterion,
    dense_schedule,
    plain_schedule,
    selective_schedule,
)
from stageinteractor import CrossStageMatcher

NUM_CLASSES, NUM_QUERIES = 4, 6
SCHEDULES = {
    "plain": plain_schedule(NUM_STAGES),
    "selective": selective_schedule(NUM_STAGES),
    "dense": dense_schedule(NUM_STAGES),
    "late": selective_schedule(NUM_STAGES, late_start=1),
}
ASSIGNERS = {
    "own labels": StagewiseMatcher(),
    "cross-stage": CrossStageMatcher(0.3),
    "neighbours": CrossStageMatcher(0.3, stage_offsets=[[-1, 1]] * NUM_STAGES),
    "stage by stage": CrossStageMatcher(0.0, stage_offsets=[[1], [2, -1], [-2], []]),
}


def plain_criterion(assigner):
    return Criterion(
        num_classes=NUM_CLASSES, matcher=HungarianMatcher(), label_assigner=ASSIGNERS[assigner]
    )


def random_outputs(schedule, num_images, seed=0):
    logits, boxes = random_predictions(
        schedule.num_groups, num_images, NUM_QUERIES, NUM_CLASSES, seed
    )
    logits.requires_grad_(), boxes.requires_grad_()
    return [HeadOutput(x, y) for x, y in zip(logits.unbind(), boxes.unbind())]


def total(losses):
    return sum(losses.values())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_a_stage_adds_up_its_groups_each_with_its_own_matching(name, counts):
    schedule = SCHEDULES[name]
    outputs, truth = random_outputs(schedule, 2), random_truth(counts, NUM_CLASSES)
    criterion = plain_criterion("own labels")
    result = RecollectionCriterion(criterion, schedule)(Predictions(outputs), truth)
    losses = result.as_dict()
    assert len(losses) == 3 * NUM_STAGES
    alone = [criterion(Predictions([output]), truth) for output in outputs]
    for t in range(NUM_STAGES):
        groups = [alone[g].as_dict() for g in schedule.groups(t)]
        for kind in ("loss_cls", "loss_bbox", "loss_giou"):
            expected = sum(group[f"{kind}_stage0"] for group in groups)
            torch.testing.assert_close(losses[f"{kind}_stage{t}"], expected)
        plain = alone[schedule.groups(t)[-1]]
        torch.testing.assert_close(result.matched_accuracy[t], plain.matched_accuracy[0])


def stages_passed(schedule):
    """For each group {stage: group} of what its input passed, itself, and where it goes on."""
    source, stage_of = {}, {}
    pool = [None]
    for t, (start, end) in enumerate(zip(schedule.starts, schedule.ends)):
        for read in pool[start:end]:
            group = len(source)
            source[group], stage_of[group] = read, t
            pool.append(group)
    ways = []
    for group in source:
        way, walker = {}, group
        while walker is not None:
            way[stage_of[walker]] = walker
            walker = source[walker]
        walker = group
        while True:
            readers = [g for g in source if source[g] == walker]
            if not readers:
                break
            walker = min(readers, key=lambda g: stage_of[g])
            way[stage_of[walker]] = walker
        ways.append(way)
    return stage_of, ways


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_labels_come_from_the_groups_own_path(name, assigner):
    schedule, label_assigner = SCHEDULES[name], ASSIGNERS[assigner]
    outputs, truth = random_outputs(schedule, 2, seed=1), random_truth([3, 2], NUM_CLASSES)
    boxes = torch.stack([x.boxes for x in outputs]).detach()
    logits = torch.stack([x.logits for x in outputs]).detach()
    assignment = HungarianMatcher()(logits, boxes, truth)
    targets = PathLabelAssigner(label_assigner, schedule)(
        assignment, boxes, truth, num_classes=NUM_CLASSES
    )
    stage_of, ways = stages_passed(schedule)
    expected = torch.zeros_like(targets.multi_hot)
    own = isinstance(label_assigner, StagewiseMatcher)
    threshold = 0.0 if own else label_assigner.iou_threshold
    scope = torch.eye(NUM_STAGES) if own else label_assigner.listens_to(NUM_STAGES)
    for group, way in enumerate(ways):
        t = stage_of[group]
        for k in range(NUM_STAGES):
            # At a stage that is left out the query is as the one before left it.
            before = [stage for stage in way if stage <= k]
            if not scope[t, k] or not before:
                continue
            for b in range(2):
                for q in range(NUM_QUERIES):
                    obj = assignment.object_index[way[max(before)], b, q]
                    if obj < 0:
                        continue
                    iou = box_iou(boxes[group, b, q], truth.boxes[b, obj])
                    if iou >= threshold:
                        expected[group, b, q, truth.labels[b, obj]] = 1
    assert torch.equal(targets.multi_hot, expected)
    if name == "selective" and not own:
        neither = PathLabelAssigner(StagewiseMatcher(), schedule)(
            assignment, boxes, truth, num_classes=NUM_CLASSES
        )
        assert not torch.equal(targets.multi_hot, neither.multi_hot)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_plain_cascade_has_the_plain_detectors_labels_and_losses(name):
    schedule, criterion = SCHEDULES[name], plain_criterion("cross-stage")
    outputs, truth = random_outputs(schedule, 2, seed=2), random_truth([3, 2], NUM_CLASSES)
    last = [schedule.groups(t)[-1] for t in range(NUM_STAGES)]
    plain = criterion(Predictions([outputs[g] for g in last]), truth)
    groups = RecollectionCriterion(criterion, schedule)(Predictions(outputs), truth).groups
    assert torch.equal(groups.class_targets.multi_hot[last], plain.class_targets.multi_hot)
    for kind in ("loss_cls", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(getattr(groups, kind)[last], getattr(plain, kind))


def test_branches_beside_the_stages_are_supervised_once():
    schedule = SCHEDULES["selective"]
    outputs, truth = random_outputs(schedule, 2), random_truth([3, 1], NUM_CLASSES)
    (proposals,) = random_outputs(plain_schedule(1), 2, seed=3)
    predictions = Predictions(outputs, (Branch("encoder", [proposals]),))
    main, branch = plain_criterion("cross-stage"), plain_criterion("own labels")
    criterion = RecollectionCriterion(BranchedCriterion(main, {"encoder": branch}), schedule)
    expected = RecollectionCriterion(main, schedule)(Predictions(outputs), truth).as_dict()
    expected |= branch(Predictions([proposals]), truth).as_dict("encoder")
    losses = criterion(predictions, truth).as_dict()
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert criterion.count_targets(predictions, truth).shape == (schedule.num_groups + 1, 2)
    assert criterion.label_assigner is main.label_assigner
    # The losses of a plain cascade, as an evaluation computes them.
    assert type(criterion.of_stages) is type(main)
    assert isinstance(criterion.of_stages.label_assigner, CrossStageMatcher)
    assert isinstance(criterion.matcher, HungarianMatcher)


def test_the_plain_criterion_is_not_changed():
    criterion = plain_criterion("cross-stage")
    wrapped = RecollectionCriterion(criterion, SCHEDULES["selective"])
    assert isinstance(criterion.label_assigner, CrossStageMatcher)
    assert not wrapped.state_dict()
    # Whoever looks at a plain cascade finds what the plain detector has.
    assert isinstance(wrapped.matcher, HungarianMatcher)
    assert isinstance(wrapped.label_assigner, CrossStageMatcher)


@pytest.mark.parametrize("assigner", ["own labels", "cross-stage"])
def test_micro_batches_with_summed_counts_add_up_to_the_whole_batch(assigner):
    schedule = SCHEDULES["selective"]
    criterion = RecollectionCriterion(plain_criterion(assigner), schedule)
    outputs, truth = random_outputs(schedule, 2), random_truth([3, 1], NUM_CLASSES)

    def part(b):
        rows = [HeadOutput(x.logits[b : b + 1], x.boxes[b : b + 1]) for x in outputs]
        count = truth.num_objects[b]
        return Predictions(rows), GroundTruth.collate(
            [truth.boxes[b, :count]], [truth.labels[b, :count]], [(80, 100)]
        )

    counts = sum(criterion.count_targets(*part(b)) for b in range(2))
    assert counts.shape == (schedule.num_groups, 2)
    whole = criterion(Predictions(outputs), truth).as_dict()
    parts = [criterion(*part(b), target_counts=counts).as_dict() for b in range(2)]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


@pytest.mark.parametrize("family", ["adamixer", "stageinteractor"])
@pytest.mark.parametrize("counts", [[0, 0], [2, 0]])
def test_every_parameter_has_a_finite_gradient(family, counts):
    detector = with_recollection(make_plain(family), SCHEDULES["selective"])
    losses, gradients = losses_and_gradients(detector, make_batch(counts))
    assert all(torch.isfinite(value) for value in losses.values())
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert gradients[name] is not None and gradients[name].isfinite().all(), name


def test_accumulated_micro_batches_have_the_gradients_of_the_whole_batch():
    detector = with_recollection(make_plain("stageinteractor"), SCHEDULES["selective"])
    batch = make_batch([2, 1])
    _, expected = losses_and_gradients(detector, batch)
    counts = sum(detector.count_targets([image]) for image in batch)
    detector.zero_grad()
    for image in batch:
        total(detector([image], target_counts=counts)).backward()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("method", ["__call__", "count_targets"])
def test_predictions_that_are_not_finite_are_reported_by_stage(method):
    schedule = SCHEDULES["selective"]
    criterion = RecollectionCriterion(plain_criterion("own labels"), schedule)
    outputs, truth = random_outputs(schedule, 2), random_truth([3, 1], NUM_CLASSES)
    for group in (schedule.groups(2)[0], schedule.groups(2)[1], schedule.groups(3)[4]):
        broken = outputs[group].logits.detach().clone()
        broken[1] = torch.nan
        outputs[group] = outputs[group]._replace(logits=broken)
    with pytest.raises(NonFinitePredictionError, match="stage 2 of image 1, stage 3 of") as caught:
        getattr(criterion, method)(Predictions(outputs), truth)
    assert caught.value.where == [(2, 1), (3, 1)]
