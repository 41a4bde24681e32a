"""What people rely on without thinking, for every family of detectors here.

A family is a config that trains on the built-in shapes, ``configs/<method>/*shapes_tiny.py``: one
that lands later is swept as well.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from small_runs import draw_blocks, make_batch
from tolerances import tolerance

from detection_toolkit.config import apply_overrides, find_config_file, get_config
from detection_toolkit.engine import Predictor
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import QueryDetector
from detection_toolkit.structures import GroundTruth, HeadOutput, Predictions, map_tensors
from detection_toolkit.training import Criterion

FOLDER = Path(find_config_file("stageinteractor/shapes_tiny.py")).parents[1]
FAMILIES = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.glob("*/*shapes_tiny.py"))
# Folders without a query-based detector of their own.
OTHERS = {"ablations", "common", "dfvt", "gpu"}
TERMS = {"class_weight": "cls", "l1_weight": "bbox", "giou_weight": "giou"}


@cache
def _built(family, route):
    cfg = get_config(family)
    if not route and "route" in cfg.model.decoder:
        cfg.model.decoder.route = None
    torch.manual_seed(0)
    detector = instantiate(cfg.model).double()
    # Past its initialisation, where many layers are zero.
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return detector


def make(family, *, route=True):
    """A detector of its own in float64, whose dropout does not disturb comparisons."""
    return copy.deepcopy(_built(family, route)).train()


def losses_of(detector, batch):
    torch.manual_seed(0)  # routes and denoising draw
    return detector(batch)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_every_method_is_swept():
    folders = {p.name for p in FOLDER.iterdir() if p.is_dir() and not p.name.startswith("_")}
    assert folders - OTHERS == {name.split("/")[0] for name in FAMILIES}
    assert all(isinstance(_built(name, True), QueryDetector) for name in FAMILIES)


def contents(batch):
    return [
        (x["image"].clone(), x["instances"].gt_boxes.tensor.clone(), x["instances"].gt_classes + 0)
        for x in batch
    ]


def test_inputs_are_not_changed(family):
    detector = make(family)
    batch = make_batch([3, 0])
    keys = [set(x) for x in batch]
    before = contents(batch)
    losses_of(detector, batch)
    with torch.no_grad():
        detector.eval()(batch)
    for old, new in zip(before, contents(batch)):
        assert all(torch.equal(a, b) for a, b in zip(old, new))
    assert [set(x) for x in batch] == keys


def answers(detector, batch):
    with torch.no_grad():
        return [x["instances"] for x in detector.eval()(batch)]


def assert_same_answers(first, second, **limits):
    for a, b in zip(first, second, strict=True):
        if not limits:
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
            assert torch.equal(a.scores, b.scores)
        else:
            torch.testing.assert_close(a.scores, b.scores, **limits)
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, **limits)
        assert torch.equal(a.pred_classes, b.pred_classes)


def test_an_image_of_bytes_is_its_copy_in_floating_point(family):
    detector = make(family)
    batch = make_batch([1, 1])
    floating = [{**x, "image": x["image"].float()} for x in batch]
    assert_same_answers(answers(detector, batch), answers(detector, floating))


def test_an_image_alone_is_the_image_in_a_batch_of_equal_sizes(family):
    detector = make(family)
    batch = make_batch([1, 1, 1])
    alone = [answers(detector, [x])[0] for x in batch]
    # Boxes are float32 numbers of up to 96 pixels, of which rounding may take two apart.
    limits = tolerance(torch.float32, scale=96, operations=4)
    assert_same_answers(answers(detector, batch), alone, **limits)


def test_answers_on_the_host_are_the_same_and_take_one_copy_of_a_batch(family, monkeypatch):
    detector = make(family)
    batch = make_batch([1, 1, 1])
    for x, height in zip(batch, (64, 128, 50)):
        x["height"] = height  # of the original image
    expected = answers(detector, batch)
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(x) or cpu(x))
    with detector.answering_on_host():
        found = answers(detector, batch)
    assert len(copies) == 1
    assert_same_answers(found, expected)
    for a, b in zip(found, expected):
        assert a.image_size == b.image_size and a.scores.dtype == b.scores.dtype
        assert a.pred_boxes.tensor.dtype == b.pred_boxes.tensor.dtype
        assert torch.equal(a.query_index, b.query_index)
    detector.select_detections = None
    with pytest.raises(TypeError), detector.answering_on_host():
        answers(detector, batch)
    assert not detector._answers_on_host


def test_any_layout_of_an_array_is_taken(family):
    predictor = _predictor(family)
    picture = draw_blocks()
    expected = [predictor(picture)["instances"]]
    read_only = picture.copy()
    read_only.setflags(write=False)
    flipped = np.ascontiguousarray(picture[::-1, ::-1])[::-1, ::-1]
    assert min(flipped.strides) < 0
    for other in (read_only, np.asfortranarray(picture), flipped):
        before = other.copy()
        assert_same_answers([predictor(other)["instances"]], expected)
        assert np.array_equal(other, before)


@cache
def _predictor(family):
    cfg = get_config(family)
    cfg.train.device = "cpu"
    cfg.train.allow_partial = True  # random weights will do
    torch.manual_seed(0)
    return Predictor(cfg)


def test_evaluation_changes_no_parameter_and_no_buffer(family):
    detector = make(family)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    buffers = {k: v.clone() for k, v in detector.named_buffers()}
    answers(detector, make_batch([1, 1]))
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    assert all(torch.equal(v, buffers[k]) for k, v in detector.named_buffers())


def test_with_fewer_stages_it_answers_as_the_last_of_them(family):
    detector = make(family).eval()
    state, batch = detector.state_dict(), make_batch([1, 1])
    outputs, by_stage = detector.inference_stages(batch)
    assert len(outputs) == detector.decoder.num_stages >= 2
    cfg = get_config(family)
    for count, expected in enumerate(by_stage, start=1):
        cfg.model.stages_at_test = count
        limited = instantiate(cfg.model).double()
        limited.load_state_dict(state)
        with torch.no_grad():
            assert_same_answers([x["instances"] for x in limited.eval()(batch)], expected)
        # What looks at all stages still does.
        for own, other in zip(limited.inference_stages(batch)[1], by_stage, strict=True):
            assert_same_answers(own, other)


def test_stages_that_are_left_out_are_not_run(family, monkeypatch):
    detector = make(family).eval()
    run, found = type(detector.decoder).run_stage, []

    def note(self, index, *args):
        found.append(index)
        return run(self, index, *args)

    monkeypatch.setattr(type(detector.decoder), "run_stage", note)
    detector.decoder.limit_stages_at_test(2)
    answers(detector, make_batch([1]))
    assert found == [0, 1]
    losses_of(detector.train(), make_batch([1]))
    assert set(found[2:]) == set(range(detector.decoder.num_stages))


@pytest.mark.parametrize("count", ["0", "99"])
def test_a_number_of_stages_that_it_lacks_is_refused(family, count):
    cfg = apply_overrides(get_config(family), [f"model.stages_at_test={count}"])
    num_stages = _built(family, True).decoder.num_stages
    with pytest.raises(UserError, match=f"model.stages_at_test=.*from 1 to {num_stages}") as caught:
        instantiate(cfg.model)
    assert "\n" not in str(caught.value)


def test_a_detector_without_stages_has_no_number_of_them():
    cfg = get_config("dfvt/mask_rcnn_dfvt_tiny_1x.py")
    with pytest.raises(UserError, match="no key 'model.stages_at_test'"):
        apply_overrides(cfg, ["model.stages_at_test=2"])


def test_gradients_reach_the_image(family):
    detector = make(family)
    batch = make_batch([2])
    batch[0]["image"] = image = batch[0]["image"].double().requires_grad_()
    sum(losses_of(detector, batch).values()).backward()
    assert image.grad.isfinite().all()
    assert (image.grad.abs().amax((1, 2)) > 0).all()


def test_stages_with_equal_predictions_have_equal_losses(family):
    detector = make(family, route=False)
    batch = make_batch([3, 2])
    images = detector.preprocess_image(batch)
    predictions = detector.predict(images)
    last = predictions.stages[-1]
    repeated = predictions._replace(stages=(last,) * len(predictions.stages))
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    detector.criterion.matcher.repeats = 1  # a method may have another number for each stage
    losses = detector.criterion(repeated, truth).as_dict()
    for name in ("cls", "bbox", "giou"):
        values = torch.stack([losses[f"loss_{name}_stage{t}"] for t in range(len(repeated.stages))])
        assert values[0] > 0
        limits = tolerance(torch.float64, scale=float(values[0].detach()), operations=1000)
        torch.testing.assert_close(values, values[:1].expand_as(values), **limits)


@pytest.mark.parametrize("weight", TERMS)
def test_a_term_scales_with_its_own_weight_only(family, weight):
    detector = make(family)
    batch = make_batch([3, 1])
    before = losses_of(detector, batch)
    for module in detector.criterion.modules():
        if isinstance(module, Criterion):
            setattr(module, weight, 4 * getattr(module, weight))  # exact in floating point
    after = losses_of(detector, batch)
    for name, value in before.items():
        factor = 4 if f"loss_{TERMS[weight]}" in name else 1
        limits = tolerance(torch.float64, scale=4 * float(value.detach()), operations=100)
        torch.testing.assert_close(after[name], factor * value, **limits)


def test_flat_and_inverted_objects_have_finite_losses_and_gradients(family):
    detector = make(family)
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(
        torch.tensor(
            [
                [10.0, 10, 10, 40],  # no width
                [10.0, 10, 50, 10],  # no height
                [20.0, 20, 20, 20],  # a point
                [60.0, 40, 30, 10],  # inverted
                [0.0, 0, 96, 64],
            ]
        )
    )
    instances.gt_classes = torch.tensor([0, 1, 2, 3, 4])
    batch = make_batch([1])
    batch[0]["instances"] = instances
    losses = losses_of(detector, batch)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)


def test_a_criterion_of_stages_leaves_its_inputs_alone(family):
    detector = make(family, route=False)
    batch = make_batch([2])
    images = detector.preprocess_image(batch)
    predictions = detector.predict(images)
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    assert isinstance(truth, GroundTruth) and isinstance(predictions, Predictions)
    before = [(x.logits.clone(), x.boxes.clone()) for x in predictions.stages]
    detector.criterion(predictions, truth)
    for (logits, boxes), stage in zip(before, predictions.stages):
        assert torch.equal(logits, stage.logits) and torch.equal(boxes, stage.boxes)


def test_losses_added_up_over_images_are_those_of_the_batch(family):
    """What the validation loss is made of."""
    detector = make(family, route=False)
    batch = make_batch([3, 0, 2])
    images = detector.preprocess_image(batch)
    stages = detector.predict(images).stages
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    criterion = detector.criterion.of_stages
    expected = criterion(Predictions(stages), truth)
    sums = 0
    for b, count in enumerate(truth.num_objects):
        own = slice(b, b + 1)
        outputs = [HeadOutput(s.logits, s.boxes, s.active) for s in stages]
        of_image = [map_tensors(lambda x, own=own: x[own], output) for output in outputs]
        objects = GroundTruth(truth.boxes[own], truth.labels[own], (count,), truth.image_sizes[own])
        sums = sums + criterion.loss_sums(of_image, objects)
    found = criterion.losses_of_sums(sums)
    assert not found.requires_grad and found.shape == (len(stages), 3)
    for column, values in zip(found.unbind(1), (expected.loss_cls, *expected[1:3])):
        limits = tolerance(torch.float64, scale=float(values.detach().max()), operations=1000)
        torch.testing.assert_close(column, values.detach(), **limits)
