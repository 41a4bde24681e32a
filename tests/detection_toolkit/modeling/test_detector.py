import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from tolerances import tolerance

from detection_toolkit.config import find_config_file
from detection_toolkit.errors import NonFinitePredictionError, UserError
from detection_toolkit.structures import StageOutput
from detection_toolkit.training import StagewiseMatcher
from stageinteractor import CrossStageMatcher, StageInteractor

TINY = "common/models/stageinteractor_tiny.py"


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return instantiate(LazyConfig.load(find_config_file(TINY)).model)


def make_image(height, width, boxes=(), classes=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.long)
    return {
        "file_name": f"{seed}.png",
        "image": torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8),
        "height": height,
        "width": width,
        "instances": instances,
    }


def with_objects(seed=0):
    return make_image(96, 128, [[5, 5, 60, 70], [40, 30, 120, 90]], [0, 3], seed=seed)


def without_objects(seed=1):
    return make_image(80, 100, seed=seed)


@pytest.mark.parametrize("batch", ["objects", "half empty", "empty"])
def test_every_batch_has_the_same_losses_and_a_gradient_for_every_parameter(detector, batch):
    images = {
        "objects": [with_objects(0), with_objects(1)],
        "half empty": [with_objects(0), without_objects(1)],
        "empty": [without_objects(0), without_objects(1)],
    }[batch]
    losses = detector.train()(images)
    expected = {f"loss_{n}_stage{t}" for n in ("cls", "bbox", "giou") for t in range(4)}
    assert set(losses) == expected
    assert all(torch.isfinite(x) and x.ndim == 0 for x in losses.values())
    sum(losses.values()).backward()
    missing = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    boxes_are_supervised = batch != "empty"
    assert (float(losses["loss_giou_stage0"].detach()) > 0) == boxes_are_supervised
    assert losses["loss_cls_stage0"] > 0


def test_detections_have_the_size_of_the_original_image(detector):
    image = make_image(96, 128)
    image.update(height=192, width=512)
    small = make_image(64, 64, seed=3)
    detections = detector.eval()([image, small])
    for found, size in zip(detections, [(192, 512), (64, 64)]):
        instances = found["instances"]
        assert instances.image_size == size
        assert len(instances) == 20
        assert instances.scores.tolist() == sorted(instances.scores.tolist(), reverse=True)
        boxes = instances.pred_boxes.tensor
        assert (boxes >= 0).all()
        assert (boxes[:, 0::2] <= size[1]).all() and (boxes[:, 1::2] <= size[0]).all()


def test_an_untrained_detector_predicts_the_whole_image(detector):
    # The box towers start at zero, so every query keeps the geometry that it begins with.
    instances = detector.eval().double()([make_image(90, 120)])[0]["instances"]
    expected = torch.tensor([0.0, 0.0, 120.0, 90.0]).expand(20, 4)
    limits = tolerance(torch.float32, scale=120, operations=4)  # of Boxes
    torch.testing.assert_close(instances.pred_boxes.tensor, expected, **limits)


def test_inference_keeps_the_best_pairs_of_query_and_class(detector):
    detector.max_detections = 3
    logits = torch.full((1, 20, 6), -9.0)
    logits[0, 7, 2], logits[0, 7, 5], logits[0, 1, 0] = 3.0, 1.0, 2.0
    boxes = torch.arange(20.0)[None, :, None] + torch.tensor([0.0, 0, 5, 5])
    output = StageOutput(logits, boxes, boxes, boxes)
    found = detector.inference(output, [(50, 50)])[0]
    assert found.pred_classes.tolist() == [2, 0, 5]
    assert found.query_index.tolist() == [7, 1, 7]
    assert found.pred_boxes.tensor[:, 0].tolist() == [7, 1, 7]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["logits", "boxes"])
def test_queries_that_are_not_finite_are_dropped_and_counted(detector, caplog, part, value):
    detector.max_detections = 120
    logits, boxes = (
        torch.randn(1, 20, 6),
        torch.arange(20.0)[None, :, None] + torch.tensor([0.0, 0, 5, 5]),
    )
    sound = detector.inference(StageOutput(logits, boxes, boxes, boxes), [(50, 50)])[0]
    # An infinite logit is a score of 0 or 1, which is finite.
    spoilt = {"logits": logits.clone(), "boxes": boxes.clone()}
    spoilt[part][0, [3, 8], 1] = value if part == "boxes" else float("nan")
    output = StageOutput(spoilt["logits"], spoilt["boxes"], boxes, boxes)
    found = detector.inference(output, [(50, 50)], stage=2, names=["a.png"])[0]
    kept = sound[~torch.isin(sound.query_index, torch.tensor([3, 8]))]
    assert torch.equal(found.scores, kept.scores)
    assert torch.equal(found.pred_boxes.tensor, kept.pred_boxes.tensor)
    assert torch.equal(found.query_index, kept.query_index)
    assert "2 of 20 queries are NaN or infinite at stage 2 of image a.png" in caplog.text


def test_the_warning_of_dropped_queries_comes_when_their_number_doubles(detector, caplog):
    boxes = torch.ones(1, 20, 4)
    boxes[0, 0] = float("nan")
    for _ in range(9):
        detector.inference(StageOutput(torch.zeros(1, 20, 6), boxes, boxes, boxes), [(50, 50)])
    assert [r.getMessage().split("(")[1] for r in caplog.records] == [
        f"{n} times so far)" for n in (1, 2, 4, 8)
    ]


def test_an_image_without_a_finite_prediction_is_refused(detector):
    images = [make_image(64, 64), make_image(64, 64, seed=1)]
    images[1]["image"] = torch.full((3, 64, 64), float("nan"))
    with pytest.raises(NonFinitePredictionError, match="stage 3 of image 1.png") as caught:
        detector.eval()(images)
    assert caught.value.where == [(3, 1)]
    with pytest.raises(NonFinitePredictionError, match="stage 0 of image 1.png"):
        detector.inference_stages(images)


def test_all_stages_are_inferred_in_one_pass_and_the_last_is_the_answer(detector):
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = [make_image(90, 120), {**make_image(64, 64, seed=1), "height": 128, "width": 128}]
    with torch.no_grad():
        answers = detector.eval()(images)
    outputs, detections = detector.inference_stages(images)
    assert len(outputs) == len(detections) == 4
    assert [x.image_size for x in detections[0]] == [(90, 120), (128, 128)]
    for answer, last in zip(answers, detections[-1]):
        assert torch.equal(answer["instances"].scores, last.scores)
        assert torch.equal(answer["instances"].pred_boxes.tensor, last.pred_boxes.tensor)
    scores = torch.stack([x.logits[1].sigmoid().max() for x in outputs])
    found = torch.stack([x[1].scores.max() for x in detections])
    torch.testing.assert_close(found, scores, **tolerance(torch.float32, scale=1, operations=4))
    assert not torch.equal(detections[0][0].scores, detections[1][0].scores)


@pytest.mark.parametrize("count", [0, -1, 5, 2.0, True, "2"])
def test_only_a_number_of_its_stages_limits_a_decoder(detector, count):
    with pytest.raises(UserError, match=r"model.stages_at_test=.* from 1 to 4, or null for all"):
        detector.decoder.limit_stages_at_test(count)
    assert detector.decoder.num_stages_at_test == detector.decoder.num_stages_run == 4


def test_all_stages_are_run_where_they_are_asked_for(detector):
    decoder = detector.eval().decoder
    decoder.limit_stages_at_test(1)
    assert decoder.num_stages_run == decoder.num_stages_at_test == 1
    with pytest.raises(RuntimeError), decoder.with_all_stages():
        with decoder.with_all_stages():
            pass
        assert decoder.num_stages_run == 4
        raise RuntimeError
    assert decoder.num_stages_run == 1
    assert decoder.train().num_stages_run == 4


def test_a_class_outside_of_the_model_is_named(detector):
    image = make_image(64, 64, [[1, 1, 30, 30]], [6])
    with pytest.raises(ValueError, match="0.png has class 6 .* the model has 6 classes"):
        detector.train()([image])


def test_training_without_ground_truth_is_named(detector):
    image = make_image(64, 64)
    del image["instances"]
    with pytest.raises(ValueError, match="0.png has no ground truth"):
        detector.train()([image])


def test_counted_targets_make_micro_batches_add_up(detector):
    detector.train().double()
    images = [with_objects(0), without_objects(1)]
    whole = sum(detector(images).values())
    counts = sum(detector.count_targets([image]) for image in images)
    # The second image is smaller: pad it as in the whole batch by giving both the same size.
    parts = sum(sum(detector([image], target_counts=counts).values()) for image in images)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("assigner", [StagewiseMatcher, CrossStageMatcher])
def test_targets_are_counted_without_predictions_where_the_objects_decide(
    detector, assigner, monkeypatch
):
    detector.train()
    detector.criterion.label_assigner = assigner()
    batch = [with_objects(0), without_objects(1)]
    images = detector.preprocess_image(batch)
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    expected = detector.criterion.count_targets(detector.predict(images), truth)
    calls = []
    predict = detector.predict
    monkeypatch.setattr(detector, "predict", lambda *args: calls.append(1) or predict(*args))
    torch.testing.assert_close(detector.count_targets(batch), expected, rtol=0, atol=0)
    assert len(calls) == (assigner is CrossStageMatcher)


def test_the_detector_is_registered():
    assert META_ARCH_REGISTRY.get("StageInteractor") is StageInteractor
