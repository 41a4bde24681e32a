import json

import pytest
import torch
from detectron2.utils.events import EventStorage
from small_runs import make_batch, make_detector

from detection_toolkit.engine.bad_batch import read_bad_batch
from detection_toolkit.engine.train_loop import DetectionTrainLoop
from detection_toolkit.errors import NonFinitePredictionError, UserError


def make_loop(model, batches, tmp_path, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=kwargs.pop("lr", 0.0))
    kwargs = {"device": "cpu", "output_dir": str(tmp_path), **kwargs}
    return DetectionTrainLoop(model, batches, optimizer, **kwargs)


def run_one_step(loop):
    with EventStorage() as storage:
        loop.run_step()
    return {k: v[0] for k, v in storage.latest().items()}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("counts", [(2, 1, 3, 2), (0, 0, 3, 1), (0, 0, 0, 0), (9, 1, 0, 2)])
def test_accumulated_batches_equal_one_large_batch(counts, tmp_path):
    images = make_batch(counts)
    whole, parts = make_detector(), make_detector()
    expected = run_one_step(make_loop(whole, [images], tmp_path))
    losses = run_one_step(
        make_loop(parts, [images[:2], images[2:]], tmp_path, accumulation_steps=2)
    )
    for name in ("total_loss", "loss_cls", "loss_bbox", "loss_giou", "stage2/cls"):
        assert losses[name] == pytest.approx(expected[name], rel=1e-9)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, rtol=1e-7, atol=1e-10)


def test_the_console_sees_sums_over_stages(tmp_path):
    scalars = run_one_step(make_loop(make_detector(), [make_batch([2])], tmp_path))
    shown = {name for name in scalars if "loss" in name}
    assert shown == {"total_loss", "loss_cls", "loss_bbox", "loss_giou"}
    for kind in ("cls", "bbox", "giou"):
        per_stage = [scalars[f"stage{t}/{kind}"] for t in range(3)]
        assert scalars[f"loss_{kind}"] == pytest.approx(sum(per_stage))
    assert scalars["grad_norm"] > 0


def test_gradients_are_clipped_to_the_norm(tmp_path):
    model = make_detector()
    scalars = run_one_step(make_loop(model, [make_batch([3])], tmp_path, clip_norm=0.5))
    norm = torch.stack([g.norm() for g in gradients(model).values()]).norm()
    assert scalars["grad_norm"] > 0.5
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


def test_bfloat16_runs_on_the_cpu_with_losses_close_to_float32(tmp_path):
    plain = run_one_step(make_loop(make_detector().float(), [make_batch([2, 1])], tmp_path))
    loop = make_loop(make_detector().float(), [make_batch([2, 1])], tmp_path, precision="bfloat16")
    half = run_one_step(loop)
    assert half["total_loss"] == pytest.approx(plain["total_loss"], rel=0.05)
    assert half["total_loss"] != plain["total_loss"]


def test_float16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float16 needs a GPU; use train.amp.precision=bfloat16"):
        make_loop(make_detector(), [], tmp_path, precision="float16")


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be one of float16, bfloat16"):
        make_loop(make_detector(), [], tmp_path, precision="float8")


class Exploding(torch.nn.Module):
    """Its loss is infinite from the second step on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.steps = 0

    def forward(self, batch):
        self.steps += 1
        scale = float("inf") if self.steps > 1 else 1.0
        return {"loss_cls_stage0": self.weight * scale, "loss_cls_stage1": self.weight * 2}


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    model = Exploding()
    loop = make_loop(model, [make_batch([1]), make_batch([1, 1])], tmp_path, lr=0.1)
    run_one_step(loop)
    weight = float(model.weight.detach())
    with pytest.raises(FloatingPointError, match="before its update: the loss is inf") as error:
        run_one_step(loop)
    assert float(model.weight.detach()) == weight
    (path,) = (tmp_path / "bad_batch").glob("*.json")
    assert str(path) in str(error.value)
    document = json.loads(path.read_text())
    assert [x["file_name"] for x in document["images"]] == ["image0.png", "image1.png"]
    assert [x["image_id"] for x in document["images"]] == [0, 1]
    assert document["losses"] == {"loss_cls_stage0": "inf", "loss_cls_stage1": pytest.approx(1.4)}
    before = {"loss_cls_stage0": pytest.approx(1.0), "loss_cls_stage1": pytest.approx(2.0)}
    assert document["losses_of_the_step_before"] == before


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_predictions_that_are_not_finite_are_described_too(accumulation_steps, tmp_path):
    model = make_detector()
    torch.nn.init.constant_(model.decoder.stages[1].class_tower.out.bias, float("nan"))
    batches = [make_batch([1]), make_batch([1, 2])]
    loop = make_loop(model, batches, tmp_path, accumulation_steps=accumulation_steps)
    with pytest.raises(FloatingPointError, match="stage 1 of image 0.*bad_batch"):
        run_one_step(loop)
    (path,) = (tmp_path / "bad_batch").glob("*.json")
    found = json.loads(path.read_text())["non_finite_predictions"]
    assert found[0] == {"stage": 1, "file_name": "image0.png"}


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path):
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, batch):
            return {"loss": self.weight.sqrt()}  # 0, with an infinite slope

    model = Root()
    with pytest.raises(FloatingPointError, match="norm of the gradient is inf"):
        run_one_step(make_loop(model, [make_batch([1])], tmp_path, lr=0.1))
    assert float(model.weight.detach()) == 0
    assert len(list((tmp_path / "bad_batch").glob("*.json"))) == 1


def test_a_model_that_is_no_query_detector_gets_the_mean_over_batches(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, batch):
            return {"loss": self.weight * len(batch)}

        def count_targets(self, batch):
            raise AssertionError("it means something else by this name")

    model = Plain()
    loop = make_loop(
        model, [make_batch([1]), make_batch([1, 1, 1])], tmp_path, accumulation_steps=2
    )
    assert run_one_step(loop)["total_loss"] == pytest.approx(2.0)
    assert float(model.weight.grad) == pytest.approx(2.0)


class Flaky(torch.nn.Module):
    """Its loss is not finite in the steps that a script says."""

    def __init__(self, script):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.script = iter(script)

    def forward(self, batch):
        return {"loss": self.weight * {"ok": 1.0, "bad": float("nan")}[next(self.script)]}


def test_a_few_steps_that_are_not_finite_are_left_out(tmp_path, caplog):
    model = Flaky(["ok", "bad", "bad", "ok", "bad", "bad", "bad"])
    batches = [make_batch([1]) for _ in range(7)]
    loop = make_loop(model, batches, tmp_path, lr=0.1, max_skipped_steps=2)
    for _ in range(6):
        run_one_step(loop)
    assert float(model.weight.detach()) == pytest.approx(0.8)  # two updates
    skipped = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert len(skipped) == 4
    assert "(1 of up to 2 in a row): the loss is nan; images image0.png" in skipped[0]
    with pytest.raises(FloatingPointError, match="after 2 steps in a row that were left out"):
        run_one_step(loop)


def test_the_count_of_skipped_steps_outlives_an_interruption(tmp_path):
    first = make_loop(Flaky(["bad"]), [make_batch([1])], tmp_path, max_skipped_steps=1)
    run_one_step(first)
    second = make_loop(Flaky(["bad"]), [make_batch([1])], tmp_path, max_skipped_steps=1)
    second.load_state_dict(first.state_dict())
    with pytest.raises(FloatingPointError):
        run_one_step(second)


def test_a_bad_batch_can_be_read_back(tmp_path):
    model = make_detector()
    torch.nn.init.constant_(model.decoder.stages[1].class_tower.out.bias, float("nan"))
    batch = make_batch([1, 2])
    with pytest.raises(FloatingPointError, match=r"tools/replay_batch\.py .*\.pth"):
        run_one_step(make_loop(model, [batch], tmp_path))
    stem = tmp_path / "bad_batch" / "iter0000000_rank0"
    content = read_bad_batch(f"{stem}.pth")
    assert (content["iteration"], len(content["batches"])) == (0, 1)
    for image, expected in zip(content["batches"][0], batch):
        assert torch.equal(image["image"], expected["image"])
        for name in ("file_name", "image_id", "height", "width"):
            assert image[name] == expected[name]
        boxes, classes = image["instances"].gt_boxes.tensor, image["instances"].gt_classes
        assert torch.equal(boxes, expected["instances"].gt_boxes.tensor)
        assert torch.equal(classes, expected["instances"].gt_classes)
    weights = torch.load(f"{stem}_weights.pth", weights_only=True)["model"]
    assert weights.keys() == model.state_dict().keys()


def test_overflows_of_the_loss_scale_are_left_out_until_it_fits(tmp_path, caplog):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, batch):
            return {"loss": 16 * self.weight}

    model = Linear()
    batches = [make_batch([1]) for _ in range(6)]
    loop = make_loop(model, batches, tmp_path, lr=0.01, max_skipped_steps=4)
    # As on a GPU with float16: the gradient overflows until the scale is halved four times.
    loop.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in range(6):
        run_one_step(loop)
    assert float(model.weight.detach()) == pytest.approx(1 - 2 * 0.16)
    messages = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert len(messages) == 4
    # Usual ones are not written down.
    assert not (tmp_path / "bad_batch").exists()


class Overflowing(torch.nn.Module):
    """Loss, gradient or predictions of its first steps are not finite."""

    def __init__(self, kinds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.other = torch.nn.Parameter(torch.zeros(3))
        self.kinds = iter(kinds)

    def forward(self, batch):
        kind = next(self.kinds, None)
        if kind == "predictions":
            raise NonFinitePredictionError([(0, 0)])
        if kind == "gradient":
            return {"loss": (self.weight - self.weight.detach()).sqrt()}
        return {"loss": self.weight * float(kind or 2.0)}


@pytest.mark.parametrize("kind", ["inf", "nan", "predictions"])
def test_the_loss_scale_is_lowered_whatever_overflows(kind, tmp_path):
    """As after a gradient that does, also in the first step of all; and the weights stay."""
    states = []
    for kinds in ([kind, kind, None], ["gradient", "gradient", None]):
        model = Overflowing(kinds)
        batches = [make_batch([1]) for _ in kinds]
        loop = make_loop(model, batches, tmp_path, lr=0.1, max_skipped_steps=2)
        loop.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        states.append([])
        for _ in range(2):
            run_one_step(loop)
            states[-1].append(loop.grad_scaler.state_dict())
        assert float(model.weight.detach()) == 1 and not model.other.any()
        run_one_step(loop)
        assert float(model.weight.detach()) == pytest.approx(0.8)
        states[-1].append(loop.grad_scaler.state_dict())
    assert states[0] == states[1]
    assert [state["scale"] for state in states[0]] == [128.0, 64.0, 64.0]


def test_an_overflow_lets_the_scaler_count_anew_before_it_grows(tmp_path):
    model = Overflowing([None, "inf", None, None])
    loop = make_loop(model, [make_batch([1])] * 4, tmp_path, max_skipped_steps=1)
    loop.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    scales = []
    for _ in range(4):
        run_one_step(loop)
        scales.append(loop.grad_scaler.get_scale())
    assert scales == [256.0, 128.0, 128.0, 256.0]
