"""The losses of Align-DETR by hand, and what becomes of them in odd batches."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import instantiate
from dino_models import make_model, small_config
from small_runs import make_batch
from torch import Tensor

from align_detr import AlignedCriterion, AlignedLoss, RankedCriterion, repeats_of_stages
from align_detr.criterion import ranks
from detection_toolkit.config import get_config
from detection_toolkit.errors import UserError
from detection_toolkit.structures import Assignment, GroundTruth, HeadOutput, Predictions
from detection_toolkit.training import HungarianMatcher, MatchNormalizer, StagewiseMatcher
from stageinteractor import CrossStageMatcher


def make_criterion(kind=RankedCriterion, repeats=2, **options):
    return kind(
        num_classes=3,
        matcher=HungarianMatcher(repeats=repeats),
        label_assigner=options.pop("label_assigner", StagewiseMatcher()),
        class_weight=1.0,
        normalizer=MatchNormalizer(),
        **options,
    )


def truth_of(*boxes: list[list[float]]) -> GroundTruth:
    """Objects of class 1 in images of 100 x 100 pixels."""
    boxes_of_images = [torch.tensor(x, dtype=torch.float64).view(-1, 4) for x in boxes]
    labels = [torch.ones(len(x), dtype=torch.long) for x in boxes_of_images]
    return GroundTruth.collate(boxes_of_images, labels, [(100, 100)] * len(boxes))


def outputs_of(boxes: Tensor, logit: float = 0.0) -> HeadOutput:
    logits = torch.full((*boxes.shape[:2], 3), -3.0, dtype=torch.float64)
    logits[..., 1] = logit
    return HeadOutput(logits.requires_grad_(), boxes.requires_grad_())


def test_the_better_query_of_an_object_counts_more():
    """Two queries of one object, IoU 1/2 and 1; another is background."""
    truth = truth_of([[0, 0, 40, 40]])
    boxes = torch.tensor([[[0, 0, 20, 40], [0, 0, 40, 40], [60, 60, 90, 90]]], dtype=torch.float64)
    output = outputs_of(boxes)
    criterion = make_criterion()
    supervision = criterion.supervise([output], truth)
    assert supervision.assignment.object_index.tolist() == [[[0, 0, -1]]]
    t = torch.tensor([0.5**0.25 * 0.5**0.75, 0.5**0.25], dtype=torch.float64)
    rho = torch.tensor([math.exp(-1 / 1.5), 1.0], dtype=torch.float64)
    torch.testing.assert_close(supervision.targets.multi_hot[0, 0, :2, 1], t * rho)
    assert supervision.targets.multi_hot.count_nonzero() == 2
    torch.testing.assert_close(supervision.box_weights[0, 0, :2], rho)
    assert supervision.counts.tolist() == [[1, 1]]  # the object, not its two queries

    result = criterion(Predictions([output]), truth)
    p = output.logits.sigmoid()
    positives = -(t * rho * p[0, :2, 1].log() + (1 - t * rho) * (1 - p[0, :2, 1]).log()).sum()
    others = torch.ones(3, 3, dtype=torch.bool)
    others[:2, 1] = False
    background = -(p[0] ** 2 * (1 - p[0]).log())[others].sum()
    torch.testing.assert_close(result.loss_cls[0], positives + background)
    assert float(result.loss_giou[0]) == pytest.approx(2 * float(rho[0]) * 0.5)
    assert float(result.loss_bbox[0]) == pytest.approx(5 * float(rho[0]) * 0.2)


def test_gradients_flow_through_the_weight_of_background():
    logits = torch.tensor([[[[0.3]]]], dtype=torch.float64, requires_grad=True)
    AlignedLoss()(logits, torch.zeros_like(logits)).sum().backward()
    p = 1 / (1 + math.exp(-0.3))
    expected = p**3 - 2 * p**2 * (1 - p) * math.log(1 - p)  # of p^2 (-log(1 - p)), by the logit
    assert float(logits.grad) == pytest.approx(expected)


def test_denoising_queries_of_an_object_count_alike():
    truth = truth_of([[0, 0, 40, 40]])
    boxes = torch.tensor([[[0, 0, 20, 40], [0, 0, 40, 40]]], dtype=torch.float64)
    given = Assignment(torch.zeros(1, 1, 2, dtype=torch.long))
    supervision = make_criterion(AlignedCriterion).supervise([outputs_of(boxes)], truth, given)
    assert supervision.box_weights.tolist() == [[[1, 1]]]
    assert supervision.counts.tolist() == [[2, 2]]


def test_a_hopeless_match_keeps_a_label():
    truth = truth_of([[0, 0, 10, 10]])
    boxes = torch.tensor([[[80, 80, 90, 90]]], dtype=torch.float64)
    supervision = make_criterion().supervise([outputs_of(boxes, -9.0)], truth)
    assert supervision.targets.multi_hot.amax() == 0.01


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_places_within_a_group(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, 12, generator=generator)
    groups = torch.randint(-1, 4, (2, 3, 12), generator=generator)
    found = ranks(scores, groups)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(12)):
        s, b, i = index.tolist()
        better = (groups[s, b] == groups[s, b, i]) & (scores[s, b] > scores[s, b, i])
        assert found[s, b, i] == better.sum()


@pytest.mark.parametrize(("objects", "k"), [(1, 3), (2, 3), (3, 2), (5, 1), (6, 1), (9, 1)])
def test_an_object_has_no_more_queries_than_there_are_for_all(objects, k):
    """Of 6 queries and 3 matches each."""
    truth = truth_of([[i, 0, i + 10, 10] for i in range(objects)])
    boxes = torch.rand(1, 6, 2, dtype=torch.float64) * 50
    output = outputs_of(torch.cat([boxes, boxes + 10], -1))
    supervision = make_criterion(repeats=3).supervise([output], truth)
    matched = supervision.assignment.object_index[supervision.assignment.matched]
    assert len(matched) == min(6, k * objects)
    assert (matched.bincount(minlength=objects) <= k).all()
    assert supervision.counts.tolist() == [[objects, objects]]
    criterion = make_criterion(repeats=3)
    assert criterion.targets_of_truth(truth, num_stages=2, num_queries=6) == [objects] * 2


def test_a_batch_without_objects_is_background_alone():
    truth = truth_of([], [])
    boxes = torch.rand(2, 4, 4, dtype=torch.float64)
    output = outputs_of(boxes)
    result = make_criterion()(Predictions([output]), truth)
    p = output.logits.sigmoid()
    torch.testing.assert_close(result.loss_cls[0], -(p**2 * (1 - p).log()).sum())
    assert result.loss_bbox[0] == result.loss_giou[0] == 0
    sum(result.as_dict().values()).backward()
    assert output.logits.grad.isfinite().all() and not output.boxes.grad.any()


def test_labels_of_other_queries_are_refused():
    with pytest.raises(UserError, match="StagewiseMatcher"):
        make_criterion(label_assigner=CrossStageMatcher())
    override = "model.criterion.main.label_assigner={_target_:stageinteractor.CrossStageMatcher}"
    with pytest.raises(UserError, match="graded label"):
        instantiate(small_config("align_detr", override))


def test_stages_have_as_many_matches_as_released():
    assert repeats_of_stages(6) == [2, 2, 2, 2, 2, 1]
    model = instantiate(small_config("align_detr", "model.decoder.num_stages=3"))
    assert model.criterion.main.matcher.repeats == [2, 2, 1]
    assert model.criterion.branches["encoder"].matcher.repeats == 2


def test_all_stages_and_branches_have_losses():
    losses = make_model("align_detr")(make_batch([2, 1]))
    terms = {f"loss_{x}" for x in ("cls", "bbox", "giou")}
    places = ["stage0", "stage1", "encoder_stage0", "denoising_stage0", "denoising_stage1"]
    assert set(losses) == {f"{term}_{place}" for term in terms for place in places}


@pytest.mark.parametrize("epochs", [12, 24])
def test_the_released_settings(epochs):
    config = get_config(f"align_detr/align_detr_r50_{epochs}e.py")
    model = config.model
    assert model.backbone.bias and model.backbone.bottom_up.freeze_at == 1
    assert (model.encoder.position_temperature, model.encoder.position_offset) == (10000, -0.5)
    assert model.initial_queries.num_queries == 900
    assert config.optimizer.lr == 1e-4 and config.optimizer.weight_decay == 1e-4
    assert config.train.max_iter * 16 // 118_287 == epochs
