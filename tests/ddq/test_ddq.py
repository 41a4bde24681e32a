"""Distinct queries, dense queries, and what is made of both."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate
from dino_models import make_model, small_config
from small_runs import make_batch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from ddq import DenseCriterion, QualityFocalLoss, TwiceSquashedCost
from ddq.decoder import DistinctSelection
from ddq.selection import distinct, first_distinct
from detection_toolkit.config import get_config
from detection_toolkit.errors import UserError
from detection_toolkit.structures import GroundTruth, HeadOutput, Predictions, Queries
from detection_toolkit.structures.boxes import xyxy_norm
from detection_toolkit.training import (
    Criterion,
    HungarianMatcher,
    MatchNormalizer,
    StagewiseMatcher,
)


def random_boxes(images=3, count=40, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(images, count, 2, generator=generator, dtype=torch.float64)
    size = 0.2 + 0.3 * torch.rand(images, count, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([center - size / 2, center + size / 2], dim=-1)
    return boxes, torch.rand(images, count, generator=generator, dtype=torch.float64)


def one_by_one(boxes: Tensor, scores: Tensor, threshold: float, candidates=None) -> Tensor:
    """Best first, each is kept unless a kept one covers it."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(len(boxes)):
        iou = box_iou(boxes[b], boxes[b])
        for i in scores[b].argsort(descending=True).tolist():
            if candidates is None or candidates[b, i]:
                kept[b, i] = not (kept[b] & (iou[i] > threshold)).any()
    return kept


@pytest.fixture(params=[False, True], ids=["image by image", "in one call"])
def at_once(request, monkeypatch):
    """As in a graph, which has no loop over the images."""
    if request.param:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@pytest.mark.parametrize("some", [False, True])
def test_no_distinct_box_covers_another(at_once, threshold, some):
    boxes, scores = random_boxes()
    candidates = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    candidates = candidates if some else None
    found = distinct(boxes, scores, threshold, candidates)
    assert torch.equal(found, one_by_one(boxes, scores, threshold, candidates))
    assert 0 < found.sum() < scores.numel()


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_first_distinct_boxes_are_those_of_all(at_once, count):
    boxes, scores = random_boxes()
    index, filled = first_distinct(boxes, scores, 0.3, count)
    kept = one_by_one(boxes, scores, 0.3)
    for b in range(3):
        best = [i for i in scores[b].argsort(descending=True).tolist() if kept[b, i]][:count]
        assert index[b, filled[b]].tolist() == best
        assert not filled[b, len(best) :].any()


def enlarge(detector):
    """Boxes so large that some cover others."""
    source = detector.initial_queries
    with torch.no_grad():
        for head in (source.head, source.dense_head):
            head.box[-1].bias[2:] += 2
    return detector


def maps_of(detector):
    return detector.extract_features(detector.preprocess_image(make_batch([1, 1])))


def test_queries_are_the_best_distinct_cells_with_their_memory():
    detector = enlarge(make_model("ddq", "model.initial_queries.iou_threshold=0.2"))
    source, maps = detector.initial_queries, maps_of(detector)
    logits, box_logits = source.predict(maps)
    boxes = box_convert(box_logits.sigmoid(), "cxcywh", "xyxy")
    index, filled = first_distinct(boxes, logits.amax(-1), 0.2, 6)
    queries, (branch,) = source.propose(maps)
    assert filled.all() and not queries.geometry.requires_grad
    memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps.levels], 1)
    for b in range(2):
        torch.testing.assert_close(queries.geometry[b], box_logits[b, index[b]].sigmoid())
        torch.testing.assert_close(queries.content[b], source.content(memory[b, index[b]]))
        torch.testing.assert_close(branch.outputs[0].logits[b], logits[b, index[b]])
    # Nothing is learned of the memory by its contents.
    grad = torch.autograd.grad(queries.content.sum(), maps.levels[0], allow_unused=True)
    assert grad == (None,)
    assert not torch.equal(index, logits.amax(-1).topk(6).indices)


def test_dense_queries_are_the_best_cells_of_another_head():
    detector = make_model("ddq")
    source, maps = detector.initial_queries, maps_of(detector)
    _, dense, (_, branch) = source.propose_all(maps)
    logits, box_logits = source.judge(source.dense_head, *source.encode(maps))
    index = logits.amax(-1).topk(9).indices  # one and a half times six
    assert branch.name == "dense_encoder" and dense.content.shape[1] == 9
    for b in range(2):
        torch.testing.assert_close(dense.geometry[b], box_logits[b, index[b]].sigmoid())
        torch.testing.assert_close(branch.outputs[0].logits[b], logits[b, index[b]])


def test_fewer_distinct_boxes_than_queries_leave_empty_ones():
    """All proposals alike: one is left."""
    detector = make_model("ddq", "model.initial_queries.iou_threshold=1e-9")
    source = detector.initial_queries
    with torch.no_grad():
        for head in (source.head, source.dense_head):
            head.box[-1].weight.zero_()
            head.box[-1].bias.copy_(torch.tensor([0.0, 0, 20, 20]))  # as large as the image
    queries, (branch,) = source.propose(maps_of(detector))
    assert queries.content[:, 0].abs().amax() > 0 and not queries.content[:, 1:].any()
    assert (queries.geometry[:, 1:] == 0.5).all()
    assert not branch.outputs[0].logits[:, 1:].any()
    names = set(make_model("ddq")(make_batch([2, 1])))
    losses = detector(make_batch([2, 1]))
    assert set(losses) == names and all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    detector.eval()
    assert len(detector(make_batch([1]))) == 1


def queries_of(boxes, kinds=None, mask=None) -> Queries:
    boxes = torch.tensor([boxes], dtype=torch.float64)
    return Queries(torch.zeros(1, boxes.shape[1], 8), boxes, attention_mask=mask, kinds=kinds)


FIRST, TWIN, OTHER = [0.3, 0.3, 0.2, 0.2], [0.31, 0.3, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]


@pytest.mark.parametrize("first_keeps_all", [False, True])
def test_a_query_that_a_better_one_covers_is_no_longer_distinct(first_keeps_all):
    selection = DistinctSelection(0.6, first_keeps_all=first_keeps_all)
    queries = queries_of([FIRST, TWIN, OTHER])
    # Query 0 stays: with it, as released, all do.
    chosen, active = selection(queries, torch.tensor([[0.9, 0.8, 0.7]]), None)
    assert active.tolist() == [[True, first_keeps_all, True]]
    # i looks at j where one of them is distinct: query 1 not at itself.
    assert chosen.attention_mask.tolist() == [
        [[False, False, False], [False, True, False], [False, False, False]]
    ]
    # Query 0 goes.
    _, active = selection(queries, torch.tensor([[0.8, 0.9, 0.7]]), None)
    assert active.tolist() == [[False, True, True]]
    # What is inactive neither comes back nor covers another.
    inactive = torch.tensor([[True, False, True]])
    chosen, active = selection(queries, torch.tensor([[0.8, 0.9, 0.7]]), inactive)
    assert active.tolist() == [[True, first_keeps_all, True]]
    assert bool(chosen.attention_mask[0, 1, 1])


def test_who_looks_at_queries_of_other_kinds_stays():
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    queries = queries_of([OTHER, FIRST, TWIN, OTHER, TWIN, TWIN], kinds=(1, 3, 2), mask=mask)
    chosen, active = DistinctSelection(0.6)(queries, torch.tensor([[0.8, 0.9, 0.7]]), None)
    assert active.tolist() == [[False, True, True]]
    expected = mask.clone()
    expected[1:4, 1:4] = torch.tensor([[True, False, False]] + [[False] * 3] * 2)
    assert torch.equal(chosen.attention_mask[0], expected)


def test_kinds_of_queries_are_apart():
    detector = make_model("ddq")
    seen = []
    detector.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    batch = make_batch([2, 1])
    detector(batch)
    (queries,) = seen
    denoising, count, dense = queries.kinds
    assert (count, dense) == (6, 9) and denoising == 40
    kind = torch.tensor([0] * denoising + [1] * count + [2] * dense)
    sees = ~queries.attention_mask
    assert sees[kind == 2][:, kind == 2].all() and sees[kind == 1][:, kind == 1].all()
    assert sees[kind == 0][:, kind == 1].all() and not sees[kind == 1][:, kind == 0].any()
    assert not sees[kind == 2][:, kind != 2].any() and not sees[kind != 2][:, kind == 2].any()


@pytest.fixture
def crowded():
    """A detector of whose queries some cover others."""
    detector = make_model(
        "ddq",
        "model.decoder.iou_threshold=0.3",
        "model.decoder.num_stages=3",
        "model.decoder.first_keeps_all=false",
        "model.initial_queries.num_queries=12",
    )
    images = detector.preprocess_image(make_batch([3, 2]))
    return enlarge(detector), images


def test_inactive_queries_are_no_detections(crowded):
    detector, images = crowded
    stages = detector.eval().predict(images).stages
    assert stages[0].active is None
    last = stages[-1]
    # Whoever became inactive stays so.
    assert not (last.active & ~stages[1].active).any() and not last.active.all()
    found = detector.inference(last, images.image_sizes)
    for b, instances in enumerate(found):
        own = last.active[b].nonzero()[:, 0].tolist()
        assert set(instances.query_index.tolist()) <= set(own)
        assert len(instances) == min(20, 6 * len(own))


def test_inactive_queries_have_no_losses(crowded):
    detector, images = crowded
    batch = make_batch([3, 2])
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    predictions = detector.predict(images, truth)
    assert not predictions.stages[2].active.all()
    for stage in predictions.stages:
        stage.logits.retain_grad()
        stage.boxes.retain_grad()
    result = detector.criterion(predictions, truth)
    sum(result.main.as_dict().values()).backward()
    for t, stage in enumerate(predictions.stages[1:], start=1):
        idle = ~stage.active
        assert not result.main.assignment.matched[t][idle].any()
        assert not stage.logits.grad[idle].any()
        assert stage.logits.grad[~idle].abs().amin() > 0


def test_losses_are_those_of_the_active_queries_alone(crowded):
    detector, images = crowded
    truth = detector.prepare_ground_truth(make_batch([3, 2]), images.image_sizes)
    output = detector.predict(images, truth).stages[2]
    criterion = detector.criterion.main
    found = criterion(Predictions([output]), truth)
    sums = []
    for b in range(2):
        own = output.active[b]
        alone = HeadOutput(output.logits[b : b + 1, own], output.boxes[b : b + 1, own])
        count = truth.num_objects[b]
        objects = GroundTruth(
            truth.boxes[b : b + 1], truth.labels[b : b + 1], (count,), truth.image_sizes[b : b + 1]
        )
        sums.append(criterion.loss_sums([alone], objects))
    expected = criterion.losses_of_sums(sum(sums))[0]
    torch.testing.assert_close(found.loss_cls[0].detach(), expected[0])
    torch.testing.assert_close(found.loss_bbox[0].detach(), expected[1])
    torch.testing.assert_close(found.loss_giou[0].detach(), expected[2])


def test_more_objects_than_active_queries_leave_some_unmatched():
    criterion = Criterion(
        num_classes=2,
        matcher=HungarianMatcher(),
        label_assigner=StagewiseMatcher(),
        normalizer=MatchNormalizer(),
    )
    truth = dense_truth([[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 70, 70]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 70, 70]]]).double()
    active = torch.tensor([[False, True, False]])
    output = HeadOutput(torch.zeros(1, 3, 2).double(), boxes, active)
    assert criterion.supervise([output], truth).assignment.object_index.tolist() == [[[-1, 1, -1]]]


def dense_criterion(repeats=4) -> DenseCriterion:
    return DenseCriterion(
        num_classes=2,
        matcher=HungarianMatcher(
            class_cost=TwiceSquashedCost(), box_code=xyxy_norm, repeats=repeats
        ),
        label_assigner=StagewiseMatcher(),
        class_weight=1.0,
    )


def dense_truth(*boxes: list[list[float]]) -> GroundTruth:
    boxes_of_images = [torch.tensor(x, dtype=torch.float64).view(-1, 4) for x in boxes]
    labels = [torch.zeros(len(x), dtype=torch.long) for x in boxes_of_images]
    return GroundTruth.collate(boxes_of_images, labels, [(100, 100)] * len(boxes))


def dense_output(images=1, count=9, seed=0) -> HeadOutput:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, count, 2, generator=generator, dtype=torch.float64)
    corner = 20 * torch.rand(images, count, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corner, corner + 30], -1)
    return HeadOutput(logits.requires_grad_(), boxes.requires_grad_())


def test_grades_of_an_object_are_relative_to_its_best_query():
    truth, output = dense_truth([[0, 0, 30, 30], [20, 20, 50, 50]]), dense_output()
    supervision = dense_criterion().supervise([output], truth)
    index = supervision.assignment.object_index[0, 0]
    assert index[index >= 0].bincount().tolist() == [4, 4]
    expected = torch.zeros(9, dtype=torch.float64)
    p = output.logits.detach().sigmoid()[0, :, 0]
    for g in range(2):
        own = index == g
        iou = box_iou(output.boxes.detach()[0, own], truth.boxes[0, g : g + 1])[:, 0]
        m = p[own] * iou**6
        expected[own] = m / (m.max() + 1e-7) * iou.max()
    torch.testing.assert_close(supervision.box_weights[0, 0], expected)
    torch.testing.assert_close(supervision.targets.multi_hot[0, 0, :, 0], expected)
    assert not supervision.targets.multi_hot[..., 1].any()
    torch.testing.assert_close(supervision.counts, expected.sum().expand(1, 2))


@pytest.mark.parametrize(("objects", "k"), [(1, 4), (2, 4), (3, 3), (4, 2), (9, 1), (12, 1)])
def test_an_object_has_up_to_four_dense_queries(objects, k):
    truth = dense_truth([[i, i, i + 30, i + 30] for i in range(objects)])
    index = dense_criterion().supervise([dense_output()], truth).assignment.object_index
    counts = index[index >= 0].bincount(minlength=objects)
    assert counts.max() <= k and counts.sum() == min(9, k * objects)


def test_an_image_without_objects_has_no_dense_loss():
    truth, output = dense_truth([[0, 0, 30, 30]], []), dense_output(images=2)
    result = dense_criterion()(Predictions([output]), truth)
    sum(result.as_dict().values()).backward()
    assert not output.logits.grad[1].any() and output.logits.grad[0].abs().amin() > 0
    first = HeadOutput(output.logits[:1], output.boxes[:1])
    alone = dense_criterion()(Predictions([first]), dense_truth([[0, 0, 30, 30]]))
    torch.testing.assert_close(result.loss_cls, alone.loss_cls)
    empty = dense_criterion()(Predictions([dense_output()]), dense_truth([]))
    assert empty.loss_cls == empty.loss_giou == 0


def test_the_quality_focal_loss():
    logits, targets = torch.tensor([[[[0.4, -1.0]]]]), torch.tensor([[[[0.7, 0.0]]]])
    p, q = logits.sigmoid().flatten().tolist()
    p, q = torch.tensor(p), torch.tensor(q)
    expected = -(0.7 * p.log() + 0.3 * (1 - p).log()) * (0.7 - p) ** 2 - (1 - q).log() * q**2
    torch.testing.assert_close(QualityFocalLoss()(logits, targets), expected[None])


def test_all_heads_start_alike():
    detector = instantiate(small_config("ddq"))
    first = detector.decoder.stages[0].head.state_dict()
    heads = [
        detector.initial_queries.head,
        detector.initial_queries.dense_head,
        *(stage.head for stage in detector.decoder.stages),
        *detector.decoder.dense_heads,
    ]
    for head in heads:
        assert all(torch.equal(first[name], x) for name, x in head.state_dict().items())
    assert len({id(head) for head in heads}) == 6


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.execution.compile=default", 'set model.execution.compile=""'),
        ("model.execution.cuda_graphs=true", "set model.execution.cuda_graphs=false"),
        ("model.decoder.iou_threshold=0", "model.decoder.iou_threshold must lie in"),
        ("model.initial_queries.iou_threshold=1.5", "model.initial_queries.iou_threshold must"),
        ("model.initial_queries.dense_ratio=0", "gives no dense query"),
    ],
)
def test_senseless_settings_are_refused(override, said):
    with pytest.raises(UserError, match=said):
        instantiate(small_config("ddq", override))


def test_too_few_cells_for_the_queries_are_named():
    detector = make_model("ddq", "model.initial_queries.num_queries=5000")
    with pytest.raises(UserError, match="5000 queries cannot be chosen"):
        detector(make_batch([1]))


def test_without_denoising_the_other_queries_stay():
    detector = make_model("ddq", "model.denoising=null", "model.criterion.denoising=null")
    losses = detector(make_batch([2, 1]))
    assert {name.split("_", 2)[2] for name in losses} == {
        *("stage0", "stage1", "encoder_stage0"),
        *("dense_encoder_stage0", "dense_stage0", "dense_stage1"),
    }


@pytest.mark.parametrize("epochs", [12, 24])
def test_the_released_settings(epochs):
    config = get_config(f"ddq/ddq_r50_{epochs}e.py")
    source = config.model.initial_queries
    assert (source.num_queries, source.dense_ratio, source.iou_threshold) == (300, 1.5, 0.8)
    assert "DistinctQueries" in str(source._target_)
    assert config.optimizer.lr == 2e-4 and config.optimizer.weight_decay == 0.05
    assert config.train.max_iter * 16 // 118_287 == epochs
    factor_at = instantiate(config.lr_multiplier)
    assert factor_at(0) == pytest.approx(1e-4)
    assert factor_at(2000 / config.train.max_iter) == pytest.approx(1)
