"""The parts of DINO and DN-Deformable-DETR, and what the toolkit does with them."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import instantiate
from dino_models import KIN, VARIANTS, make_model, small_config
from small_runs import make_batch
from tolerances import tolerance
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from detection_toolkit.errors import UserError
from detection_toolkit.export.graph import DetectionGraph, exportable_detector, trace
from detection_toolkit.structures import Assignment, GroundTruth, Queries
from detection_toolkit.training import StagewiseMatcher
from dino import BoxDenoising, ContrastiveDenoising, PositiveFocalLoss
from dino.denoising import Noise
from sqr import QueryRecollection, plain_schedule, selective_schedule
from stageinteractor import CrossStageMatcher

SIZES = [(64, 96), (72, 100)]


def truth_of(counts) -> GroundTruth:
    batch = make_batch(counts)
    return GroundTruth.collate(
        [x["instances"].gt_boxes.tensor.double() for x in batch],
        [x["instances"].gt_classes for x in batch],
        SIZES[: len(counts)],
    )


def detecting(count=3, channels=8, images=2) -> Queries:
    return Queries(
        torch.randn(images, count, channels, dtype=torch.float64),
        torch.rand(images, count, 4, dtype=torch.float64),
    )


def contrastive(**options) -> ContrastiveDenoising:
    torch.manual_seed(0)
    return ContrastiveDenoising(6, 8, **options).double()


def boxes_of(truth: GroundTruth) -> Tensor:
    """(B, M, 4) centre and size as shares of the image."""
    sizes = truth.image_sizes.repeat(1, 2)[:, None]
    return box_convert(truth.boxes / sizes, "xyxy", "cxcywh").double()


def test_a_group_has_two_queries_for_each_object_and_the_budget_gives_the_groups():
    truth, queries = truth_of([4, 2]), detecting()
    denoised, index = contrastive(budget=10, label_noise=0.0, box_noise=0.0)(queries, truth)
    # Two groups of 4 positive and 4 negative slots, of which the second image fills two each.
    assert index.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1] * 2, [0, 1, -1, -1, -1, -1, -1, -1] * 2]
    assert torch.equal(denoised.content[:, 16:], queries.content)
    assert torch.equal(denoised.geometry[:, 16:], queries.geometry)
    slots = denoised.geometry[:, :16].view(2, 2, 2, 4, 4)  # image, group, kind, slot
    expected = boxes_of(truth)
    for group in range(2):
        torch.testing.assert_close(slots[0, group, 0], expected[0])
        torch.testing.assert_close(slots[1, group, 0, :2], expected[1, :2])
    content = denoised.content[:, :16].view(2, 2, 2, 4, 8)
    assert not content[1, :, :, 2:].any() and (slots[1, :, :, 2:] == 0.5).all()
    assert content[0].abs().amin() > 0


@pytest.mark.parametrize(("most", "groups"), [(1, 100), (3, 33), (100, 1), (101, 1), (400, 1)])
def test_there_is_a_group_even_for_more_objects_than_the_budget(most, groups):
    assert contrastive().num_groups(most) == groups


def test_positives_stay_near_and_negatives_do_not():
    """Half a side at most, and half a side at least, at each corner."""
    denoising = contrastive(budget=60)
    corners = torch.tensor([[[0.4, 0.4, 0.6, 0.6]]], dtype=torch.float64)
    noise = denoising.draw((60, 2, 1, 1), corners)
    moved = box_convert(denoising.noised(corners, noise), "cxcywh", "xyxy")
    distance = (moved - corners).abs() / 0.1
    assert distance[:, 0].max() < 1 + 1e-9 and distance[:, 1].min() > 1 - 1e-9
    assert distance[:, 0].mean() == pytest.approx(0.5, abs=0.1)
    assert (noise.sign.abs() == 1).all() and noise.sign.mean().abs() < 0.3
    # Most negatives are what a match would not take; no positive is far.
    iou = [box_iou(x.flatten(0, 2), corners[0]).flatten() for x in moved.unbind(1)]
    assert iou[0].mean() > 2 * iou[1].mean()


def test_labels_are_replaced_at_the_rate():
    for rate in (0.0, 1.0):
        denoising = contrastive(label_noise=rate)
        with torch.no_grad():
            denoising.label_embedding.weight.copy_(torch.arange(6)[:, None].expand(-1, 8))
        truth = truth_of([5, 5])
        content = denoising(detecting(), truth).queries.content[:, :-3, 0].view(2, -1, 5)
        same = (content == truth.labels[:, None]).double().mean()
        assert (same == 1) if rate == 0 else (same < 0.5)


def test_denoising_of_dn_detr_moves_centre_and_size_and_says_what_it_is():
    torch.manual_seed(0)
    denoising = BoxDenoising(6, 8, num_groups=2, label_noise=0.0).double()
    truth = truth_of([2, 1])

    def draw(shape, like):
        ones = like.new_ones(*shape, 4)
        return Noise(like.new_ones(shape), truth.labels.expand(shape), ones * 0.5, ones)

    denoising.draw = draw
    (queries, index) = denoising(detecting(), truth)
    assert index.tolist() == [[0, 1, 0, 1], [0, -1, 0, -1]]
    boxes = boxes_of(truth)
    sizes = boxes[..., 2:]
    expected = boxes + 0.2 * torch.cat([sizes / 2, sizes], -1)
    torch.testing.assert_close(queries.geometry[0, :2], expected[0])
    assert queries.content[..., -1][:, :4].tolist() == [[1, 1, 1, 1], [1, 0, 1, 0]]


def test_groups_are_apart_and_detecting_queries_see_no_denoising_one():
    mask = contrastive(budget=4)(detecting(), truth_of([2, 1])).queries.attention_mask
    group = torch.tensor([0] * 4 + [1] * 4 + [2] * 3)  # 2 stands for the detecting ones
    for i in range(11):
        for j in range(11):
            sees = group[i] == group[j] or group[j] == 2
            assert bool(mask[i, j]) != sees, (i, j)


@pytest.mark.parametrize("variant", [*VARIANTS, *KIN])
def test_what_is_detected_does_not_depend_on_denoising(variant):
    detector = make_model(variant)
    batch = make_batch([3, 1])
    images = detector.preprocess_image(batch)
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    with_it, without = detector.predict(images, truth), detector.predict(images)
    branch = {x.name: x for x in with_it.branches}["denoising"]
    assert branch.outputs[0].boxes.shape[1] == branch.assignment.object_index.shape[2] > 0
    limits = tolerance(torch.float64, scale=96.0, operations=1000)
    for one, other in zip(with_it.stages, without.stages, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes, **limits)
        torch.testing.assert_close(one.logits, other.logits, **limits)
        assert one.queries.attention_mask is None
        assert one.queries.content.shape == one.queries.geometry.shape[:2] + (16,)


@pytest.mark.parametrize("variant", [*VARIANTS, *KIN])
def test_a_group_does_not_depend_on_another(variant):
    detector = make_model(variant)
    batch = make_batch([2, 2])
    images = detector.preprocess_image(batch)
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    draw, results = detector.denoising.draw, []
    for change in (False, True):

        def changed(shape, like, change=change):
            torch.manual_seed(0)
            noise = draw(shape, like)
            if change:
                noise.amount[1:] = 1 - noise.amount[1:]
            return noise

        detector.denoising.draw = changed
        branch = {x.name: x for x in detector.predict(images, truth).branches}["denoising"]
        results.append(branch.outputs[-1].boxes)
    size = 2 * detector.denoising.num_kinds
    limits = tolerance(torch.float64, scale=96.0, operations=1000)
    torch.testing.assert_close(results[0][:, :size], results[1][:, :size], **limits)
    assert not torch.allclose(results[0][:, size:], results[1][:, size:])


@pytest.mark.parametrize("variant", [*VARIANTS, *KIN])
@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (40, 1)])
def test_any_number_of_objects_has_the_same_losses_and_gradients(variant, counts):
    """None in the batch, and more than queries and budget."""
    detector = make_model(variant)
    names = set(detector(make_batch([2, 1])))
    losses = detector(make_batch(counts))
    assert set(losses) == names
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if not any(counts):
        assert all(losses[x] == 0 for x in names if "denoising" in x or "cls" not in x)


def test_slots_that_nothing_fills_are_no_background_for_dn_detr():
    logits = torch.randn(2, 1, 3, 4, requires_grad=True)
    targets = torch.zeros(2, 1, 3, 4)
    targets[:, 0, 1, 2] = 1
    loss = PositiveFocalLoss()(logits, targets)
    alone = PositiveFocalLoss()(logits[:, :, 1:2], targets[:, :, 1:2])
    torch.testing.assert_close(loss, alone)
    loss.sum().backward()
    assert logits.grad[:, 0, 1].all() and not logits.grad[:, 0, [0, 2]].any()


def sine(share: Tensor, count: int) -> Tensor:
    """(...) -> (..., count), number by number."""
    codes = []
    for k in range(count):
        angle = 2 * math.pi * share / 10000 ** (2 * (k // 2) / count)
        codes.append(angle.cos() if k % 2 else angle.sin())
    return torch.stack(codes, -1)


def position_of(decoder: nn.Module, box: Tensor, maps) -> Tensor:
    x, y, width, height = (box * maps.valid_ratios[:, None, 0].repeat(1, 1, 2)).unbind(-1)
    code = torch.cat([sine(number, 8) for number in (y, x, width, height)], -1)
    first, _, second = decoder.position.layers
    return second(first(code).relu())


def logit(share: Tensor, eps: float) -> Tensor:
    share = share.clamp(0, 1)
    return (share.clamp(min=eps) / (1 - share).clamp(min=eps)).log()


def layer(stage: nn.Module, content: Tensor, position: Tensor, box: Tensor, maps) -> Tensor:
    placed = content + position
    attended = stage.self_attention.attention(placed, placed, content)[0]
    content = stage.self_attention.norm(content + attended)
    levels = box[:, :, None] * maps.valid_ratios.to(box)[:, None].repeat(1, 1, 1, 2)
    content = stage.norm(content + stage.attention(content + position, levels, maps))
    hidden = stage.ffn.linear2(stage.ffn.linear1(content).relu())
    return stage.ffn.norm(content + hidden)


def in_pixels(box: Tensor, maps) -> Tensor:
    return box_convert(box, "cxcywh", "xyxy") * maps.image_sizes.flip(-1).repeat(1, 2)[:, None]


def padded(detector: nn.Module):
    """Maps of a batch whose second image is smaller, and the queries of it."""
    batch = make_batch([1, 1])
    batch[1]["image"] = batch[1]["image"][:, :40, :56]
    maps = detector.extract_features(detector.preprocess_image(batch))
    return maps, detector.initial_queries(maps)


@pytest.mark.parametrize("variant", ["dino", "dino_shared_head"])
def test_the_decoder_looks_forward_twice(variant):
    detector = make_model(variant, "model.decoder.prediction_eps=1e-5")
    decoder = detector.decoder
    maps, queries = padded(detector)
    content = queries.content
    kept = box = queries.geometry  # with and without the gradient
    outputs = decoder(maps, queries)
    for stage, output in zip(decoder.stages, outputs, strict=True):
        content = layer(stage, content, position_of(decoder, box, maps), box, maps)
        normed = decoder.norm(content)
        torch.testing.assert_close(output.logits, stage.head.classes(normed))
        predicted = (stage.head.box(normed) + logit(kept, 1e-5)).sigmoid()
        torch.testing.assert_close(output.boxes, in_pixels(predicted, maps))
        kept = (stage.head.box(content) + logit(box, 1e-3)).sigmoid()
        box = kept.detach()

    # What the second stage predicts trains the refinement of the first, by its box alone.
    detector.zero_grad()
    (by_box,) = torch.autograd.grad(
        outputs[1].boxes.square().sum(), outputs[0].queries.geometry, retain_graph=True
    )
    assert by_box.abs().amin() > 0
    (by_logits,) = torch.autograd.grad(
        outputs[1].logits.sum(), outputs[0].queries.geometry, allow_unused=True
    )
    assert by_logits is None


def test_the_decoder_of_dn_deformable_detr_scales_positions():
    detector = make_model("dn_deformable")
    decoder = detector.decoder
    maps, queries = padded(detector)
    assert not queries.content[..., -1].any()
    content, box = queries.content, queries.geometry
    for t, output in enumerate(decoder(maps, queries)):
        stage, position = decoder.stages[t], position_of(decoder, box, maps)
        if t:
            first, _, second = decoder.scale
            position = position * second(first(content).relu())
        content = layer(stage, content, position, box, maps)
        torch.testing.assert_close(output.logits, stage.head.classes(content))
        predicted = (stage.head.box(content) + logit(box, 1e-3)).sigmoid()
        torch.testing.assert_close(output.boxes, in_pixels(predicted, maps))
        box = predicted.detach()
        assert not output.queries.geometry.requires_grad


def test_queries_are_the_best_cells_of_any_class_with_contents_of_their_rank():
    detector = make_model("dino")
    maps, queries = padded(detector)
    source = detector.initial_queries
    logits, box_logits = source.predict(maps)
    _, (branch,) = source.propose(maps)
    for b in range(2):
        order = logits[b].max(-1).values.argsort(descending=True)[:6]
        torch.testing.assert_close(queries.geometry[b], box_logits[b, order].sigmoid())
        torch.testing.assert_close(branch.outputs[0].logits[b], logits[b, order])
        assert torch.equal(queries.content[b], source.content.weight)
    assert not queries.geometry.requires_grad and branch.outputs[0].boxes.requires_grad


def test_own_labels_can_be_kept():
    """Stage 0 has a poor box of its own object, and stage 1 a good one of another."""
    truth = GroundTruth.collate(
        [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])], [torch.tensor([0, 1])], [(40, 40)]
    )
    assignment = Assignment(torch.tensor([[[0, -1]], [[1, -1]]]))
    boxes = truth.boxes[0, 1].expand(2, 1, 2, 4)  # all boxes are the second object's
    rule = {"assignment": assignment, "boxes": boxes, "truth": truth, "num_classes": 3}
    targets = CrossStageMatcher()(**rule).multi_hot[:, 0, 0]
    kept = CrossStageMatcher(keep_own=True)(**rule).multi_hot[:, 0]
    assert targets.tolist() == [[0, 1, 0], [0, 1, 0]]
    assert kept[:, 0].tolist() == [[1, 1, 0], [0, 1, 0]] and not kept[:, 1].any()
    own = StagewiseMatcher()(**rule).multi_hot
    assert (CrossStageMatcher(keep_own=True)(**rule).multi_hot >= own).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_cross_stage_labels_reach_the_stages_alone(variant):
    own, crossed = (
        make_model(variant, *overrides)
        for overrides in (
            [],
            ["model.criterion.main.label_assigner={_target_:stageinteractor.CrossStageMatcher}"],
        )
    )
    results = []
    for detector in (own, crossed):
        torch.manual_seed(1)
        results.append(detector(make_batch([4, 3])))
    assert results[0].keys() == results[1].keys()
    changed = {name for name, x in results[0].items() if not torch.equal(x, results[1][name])}
    assert changed and all(name.startswith("loss_cls_stage") for name in changed)


@pytest.mark.parametrize("variant", [*VARIANTS, *KIN])
@pytest.mark.parametrize("execution", ["sampling=grid", "channels_last=false", "checkpoint=true"])
def test_ways_of_computing_agree(variant, execution):
    batch, results = make_batch([2, 1]), []
    weights = make_model(variant).state_dict()
    for overrides in ([], [f"model.execution.{execution}"]):
        detector = make_model(variant, *overrides)
        detector.load_state_dict(weights)
        torch.manual_seed(1)
        losses = detector(batch)
        sum(losses.values()).backward()
        results.append((losses, [p.grad for p in detector.parameters()]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_compiled_is_the_detector_at_inference(variant, monkeypatch):
    """In training the number of queries changes from batch to batch."""

    def refuse(*arguments, **options):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    detector = make_model(variant, "model.execution.compile=default")
    assert detector(make_batch([2, 1]))
    with pytest.raises(AssertionError, match="compiled"):
        detector.eval()(make_batch([1]))


def test_without_denoising_no_query_is_added():
    detector = make_model("dino", "model.denoising=null", "model.criterion.denoising=null")
    losses = detector(make_batch([2, 1]))
    assert {name.split("_")[2] for name in losses} == {"stage0", "stage1", "encoder"}
    half = make_model("dino", "model.denoising=null")
    with pytest.raises(UserError, match="denoising"):
        half(make_batch([2, 1]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("schedule", [plain_schedule(2), selective_schedule(2)])
def test_groups_of_recollection_are_denoised_apart_or_at_once(variant, schedule):
    results = []
    for batched in (True, False):
        detector = make_model(variant)
        detector.decoder.route = QueryRecollection(schedule, batched=batched)
        detector.criterion = detector.decoder.route.supervise(detector.criterion)
        torch.manual_seed(1)
        losses = detector(make_batch([2, 1]))
        sum(losses.values()).backward()
        results.append((losses, [p.grad for p in detector.parameters()]))
    torch.testing.assert_close(results[0], results[1])
    groups = sum(name.startswith("loss_cls_denoising") for name in results[0][0])
    assert groups == schedule.num_groups


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("label_noise=1.5", "label_noise must lie in"),
        ("box_noise=-1", "box_noise must not be negative"),
        ("budget=0", "set model.denoising=null"),
    ],
)
def test_senseless_denoising_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        instantiate(small_config("dino", f"model.denoising.{change}"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, *KIN])
def test_the_exported_program_takes_any_batch_and_size(variant):
    detector = exportable_detector(small_config(variant), make_model(variant).float().state_dict())
    images = 255 * torch.rand(3, 3, 150, 203)
    sizes = torch.tensor([[150, 203], [120, 203], [150, 101]])
    ours = DetectionGraph(detector)(images, sizes)
    exported = trace(detector).module()(images, sizes)
    limits = tolerance(torch.float32, scale=203.0, operations=1000)
    for expected, found in zip(ours, exported):
        torch.testing.assert_close(found, expected, **limits)
