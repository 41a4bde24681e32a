"""The detector: refiner stack, auxiliary heads and losses, and what the toolkit does with it."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate
from dino_models import make_model as make_dino
from hpr_models import WITHOUT_DENOISING, make_model, small_config
from omegaconf import OmegaConf
from small_runs import make_batch
from tolerances import tolerance
from torch import Tensor
from torchvision.ops import box_convert

from detection_toolkit.export.graph import DetectionGraph, exportable_detector, trace
from detection_toolkit.structures import Predictions
from sqr import QueryRecollection, selective_schedule

HEADS = ("regional", "dynamic")


def predictions_of(detector, batch):
    images = detector.preprocess_image(batch)
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    torch.manual_seed(1)
    return detector.predict(images, truth), truth


def logit(share: Tensor, eps: float) -> Tensor:
    share = share.clamp(0, 1)
    return (share.clamp(min=eps) / (1 - share).clamp(min=eps)).log()


def test_auxiliary_heads_predict_beside_the_references_of_the_primary_refiner():
    detector = make_model(*WITHOUT_DENOISING)
    decoder = detector.decoder
    maps = detector.extract_features(detector.preprocess_image(make_batch([1, 1])))
    queries = detector.initial_queries(maps)
    outputs = decoder(maps, queries)
    sizes = maps.image_sizes.flip(-1).repeat(1, 2)[:, None]
    reference = queries.geometry
    for t, (stage, output) in enumerate(zip(decoder.stages, outputs, strict=True)):
        position = decoder.position(reference.detach(), maps)
        placed = queries._replace(geometry=reference.detach(), position=position)
        content, found = stage.refine(placed, maps)
        assert tuple(output.auxiliary) == HEADS
        for name in HEADS:
            head = decoder.auxiliary_heads[name][t]
            feature = decoder.auxiliary_norms[name](stage.auxiliary[name].ffn.norm(found[name]))
            torch.testing.assert_close(output.auxiliary[name].logits, head.classes(feature))
            box = (head.box(feature) + logit(reference, 1e-5)).sigmoid()
            expected = box_convert(box, "cxcywh", "xyxy") * sizes
            torch.testing.assert_close(output.auxiliary[name].boxes, expected)
        reference = (stage.head.box(content) + logit(reference.detach(), 1e-3)).sigmoid()
        torch.testing.assert_close(output.queries.geometry, reference)
        queries = queries._replace(content=content)


def test_auxiliary_losses_train_the_refinement_of_the_stage_before():
    detector = make_model(*WITHOUT_DENOISING)
    predictions, truth = predictions_of(detector, make_batch([2, 1]))
    losses = detector.criterion(predictions, truth)
    for name in HEADS:
        box = losses.branches[name].loss_bbox
        weight = detector.decoder.stages[0].head.box[4].weight
        (by_second,) = torch.autograd.grad(box[1], weight, retain_graph=True)
        (by_first,) = torch.autograd.grad(box[0], weight, retain_graph=True)
        assert by_second.any() and not by_first.any()


def test_at_inference_the_heads_are_silent_and_the_answer_is_the_same():
    detector = make_model()
    batch = make_batch([1, 1])
    images = detector.preprocess_image(batch)
    in_training = detector.predict(images).stages
    detector.eval()
    stages = detector.predict(images).stages
    assert all(x.auxiliary is None for x in stages)
    with detector.decoder.with_auxiliary():
        asked = detector.predict(images).stages
    limits = tolerance(torch.float64, scale=96.0, operations=1000)
    for one, other, more in zip(in_training, stages, asked, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes, **limits)
        assert torch.equal(other.boxes, more.boxes)
        for name in HEADS:
            assert more.auxiliary[name].boxes.shape == more.boxes.shape


def test_each_head_is_matched_on_its_own_and_its_losses_count_half():
    detector = make_model()
    predictions, truth = predictions_of(detector, make_batch([4, 3]))
    result = detector.criterion(predictions, truth)
    assert set(result.branches) == {
        "encoder",
        "denoising",
        *HEADS,
        *(f"{name}_denoising" for name in HEADS),
    }
    by_name = {branch.name: branch for branch in predictions.branches}
    main = detector.criterion.main
    for name in HEADS:
        alone = main(Predictions(by_name[name].outputs), truth)
        found = result.branches[name]
        for term in ("loss_cls", "loss_bbox", "loss_giou"):
            torch.testing.assert_close(getattr(found, term), 0.5 * getattr(alone, term))
        index = found.assignment.object_index
        assert torch.equal(index, alone.assignment.object_index)
        assert not torch.equal(index, result.main.assignment.object_index)
        denoised = result.branches[f"{name}_denoising"]
        given = result.branches["denoising"]
        assert torch.equal(denoised.assignment.object_index, given.assignment.object_index)
        assert torch.equal(denoised.cls_normalizer, given.cls_normalizer)
    total = sum(result.as_dict().values())
    assert total.isfinite() and len(result.as_dict()) == 3 * (2 + 1 + 2 + 2 * (2 + 2))


def test_weights_of_the_auxiliary_losses_are_the_configs():
    results = []
    for weight in (0.5, 2.0):
        detector = make_model(f"model.criterion.auxiliary.dynamic={weight}")
        predictions, truth = predictions_of(detector, make_batch([2, 1]))
        results.append(detector.criterion(predictions, truth).as_dict())
    for name, value in results[0].items():
        factor = 4 if "_dynamic_" in name else 1
        torch.testing.assert_close(results[1][name], factor * value)


@pytest.mark.parametrize("merge", ["channel", "scalar", "fixed"])
def test_with_weights_1_0_0_it_is_dino_exactly(merge):
    config = small_config()
    same = [
        f"model.{key}={OmegaConf.select(config, key)}"
        for key in ("decoder.prediction_eps", "backbone.bias", "pixel_std")
    ]
    dino = make_dino("dino", *same)
    detector = make_model("model.decoder.merge_start=[1,0,0]", f"model.decoder.merge={merge}")
    weights = dino.state_dict()
    missing, surplus = detector.load_state_dict(weights, strict=False)
    assert not surplus
    assert all(name.startswith("decoder.") for name in missing)
    with torch.no_grad():
        for stage in detector.decoder.stages:
            for merging in (stage.merge_attended, stage.merge_refined):
                merging.weights.copy_(torch.tensor([1.0, 0.0, 0.0]))
    batch = make_batch([2, 1])
    losses = []
    for model in (dino, detector):
        torch.manual_seed(1)
        model.criterion.main.matcher.class_cost.eps = 1e-12
        losses.append(model(batch))
    for name, value in losses[0].items():
        assert torch.equal(value, losses[1][name]), name
    found = [model.eval()(batch) for model in (dino, detector)]
    for one, other in zip(*found, strict=True):
        one, other = one["instances"], other["instances"]
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (40, 1)])
def test_any_number_of_objects_has_the_same_losses_and_gradients(counts):
    detector = make_model()
    names = set(detector(make_batch([2, 1])))
    losses = detector(make_batch(counts))
    assert set(losses) == names
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "execution", ["sampling=grid", "mixing=direct", "checkpoint=true", "channels_last=false"]
)
def test_ways_of_computing_agree(execution):
    batch, results = make_batch([2, 1]), []
    weights = make_model().state_dict()
    for overrides in ([], [f"model.execution.{execution}"]):
        detector = make_model(*overrides)
        detector.load_state_dict(weights)
        torch.manual_seed(1)
        losses = detector(batch)
        sum(losses.values()).backward()
        results.append((losses, [p.grad for p in detector.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_it_starts_as_released():
    """Of the tensors that are drawn, by their distribution."""
    torch.manual_seed(0)
    config = small_config(
        "model.backbone.out_channels=64", "model.backbone.norm_groups=8", "model.num_classes=80"
    )
    detector = instantiate(config)
    decoder, stage = detector.decoder, detector.decoder.stages[1]
    for merge in (stage.merge_attended, stage.merge_refined):
        assert (merge.weights == 1).all()
    dynamic, regional = stage.auxiliary["dynamic"], stage.auxiliary["regional"]
    for layer in (
        dynamic.look.filters,
        dynamic.look.out,
        dynamic.ffn.linear1,
        regional.look.samples,
        regional.look.attention.out_proj,
        regional.look.out,
    ):
        rows, columns = layer.weight.shape
        bound = (6 / (rows + columns)) ** 0.5  # Xavier
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    for attention in (regional.look.attention, regional.self_attention.attention):
        assert not attention.in_proj_bias.any() and not attention.out_proj.bias.any()
        assert attention.in_proj_weight.abs().max() <= (6 / (4 * 64)) ** 0.5
    for layer in (dynamic.look.filters, dynamic.look.out):
        assert 0 < layer.bias.abs().max() <= layer.in_features**-0.5
    heads = [detector.initial_queries.head, *(x.head for x in decoder.stages)]
    own = heads[0].state_dict()
    assert all(torch.equal(x.state_dict()[k], own[k]) for x in heads for k in own)
    for name in HEADS:
        first, second = (x.state_dict() for x in decoder.auxiliary_heads[name])
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert not torch.equal(first["classes.weight"], own["classes.weight"])
        assert not first["box.4.weight"].any() and not first["box.4.bias"].any()
        assert first["classes.weight"].abs().max() <= 64**-0.5
    others = [decoder.auxiliary_heads[name][0].classes.weight for name in HEADS]
    assert not torch.equal(*others)


@pytest.mark.parametrize("refiner", HEADS)
def test_a_refiner_of_regions_can_stand_alone(refiner):
    detector = make_dino(
        "dino",
        "model.decoder._target_=hpr.SingleRefinerDecoder",
        f"+model.decoder.refiner={refiner}",
        "+model.decoder.inner_channels=4",
        "+model.decoder.finest_scale=28",
    )
    losses = detector(make_batch([2, 1]))
    sum(losses.values()).backward()
    assert {name.split("_stage")[0] for name in losses} == {
        f"loss_{term}{branch}"
        for term in ("cls", "bbox", "giou")
        for branch in ("", "_encoder", "_denoising")
    }
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not any("sampling_offsets" in name for name in detector.decoder.state_dict())
    results = [detector.eval()(make_batch([1]))[0]["instances"] for _ in range(2)]
    detector.decoder.execution.sampling = "grid"
    results.append(detector(make_batch([1]))[0]["instances"])
    for other in results[1:]:
        torch.testing.assert_close(results[0].pred_boxes.tensor, other.pred_boxes.tensor)


def test_groups_of_recollection_have_auxiliary_losses():
    detector = make_model()
    route = QueryRecollection(selective_schedule(2))
    detector.decoder.route = route
    detector.criterion = route.supervise(detector.criterion)
    losses = detector(make_batch([2, 1]))
    sum(losses.values()).backward()
    groups = sum(name.startswith("loss_cls_regional_denoising") for name in losses)
    assert groups == selective_schedule(2).num_groups


def test_mixed_precision_has_finite_losses():
    detector = make_model().float()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(make_batch([2, 1]))
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.slow
def test_the_exported_program_takes_any_batch_and_size():
    detector = exportable_detector(small_config(), make_model().float().state_dict())
    images = 255 * torch.rand(3, 3, 150, 203)
    sizes = torch.tensor([[150, 203], [120, 203], [150, 101]])
    ours = DetectionGraph(detector)(images, sizes)
    exported = trace(detector).module()(images, sizes)
    limits = tolerance(torch.float32, scale=203.0, operations=1000)
    for expected, found in zip(ours, exported):
        torch.testing.assert_close(found, expected, **limits)
