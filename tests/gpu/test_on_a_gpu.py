"""What only a GPU can show: forms agree there, and equal runs end with equal weights."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from detection_toolkit.engine.train_loop import DetectionTrainLoop
from detection_toolkit.parity import Settings, check_case
from detection_toolkit.studies.environment import ROOT
from detection_toolkit.studies.gpu_report import GpuPlan
from detection_toolkit.studies.gpu_report.context import Context
from detection_toolkit.studies.gpu_report.forms import execution, tf32
from detection_toolkit.studies.gpu_report.stages.correct import (
    FUSED_LIMIT,
    LIMIT,
    detector_in_form,
    differences,
    gradients_of,
    random_images,
    recorded,
    sampled,
)
from detection_toolkit.studies.gpu_report.stages.repeats import weights_of_two_runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")

PLAN = GpuPlan.read(ROOT / "configs" / "gpu" / "small.yaml")
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("form", ["gather", "plain", "triton"])
@pytest.mark.parametrize("path", PLAN.case_files(), ids=lambda path: path.stem)
def test_reference_cases_agree(path, form):
    with tf32(enabled=False):
        report = check_case(path, Settings(device="cuda", execution=execution(form)))
    assert report.ok, [row for row in report.rows if not row.ok]


@pytest.mark.parametrize("form, limit", [("gather", LIMIT), ("triton", FUSED_LIMIT)])
def test_losses_and_gradients_are_those_of_the_plain_form(form, limit):
    found = []
    for name in ("plain", form):
        detector = detector_in_form(PLAN.models[0], name, DEVICE)
        images = random_images(PLAN.compared_size, detector.num_classes)
        found.append(gradients_of(detector, images))
    worst, where = differences(found[1], found[0])
    assert worst <= limit, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_sampling_kernel_has_the_values_and_gradients_of_grid_sample(dtype):
    with tf32(enabled=False):
        reference = sampled(DEVICE, "plain", dtype)
        worst, where = differences(sampled(DEVICE, "triton", dtype), reference)
    assert worst <= (1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps), where


@pytest.mark.parametrize("model", PLAN.models, ids=lambda model: model.name)
def test_recorded_detections_are_those_of_the_network_also_with_newer_weights(model, tmp_path):
    context = Context(PLAN, DEVICE, tmp_path, lambda part: part, time.monotonic() + 600)
    (row,) = recorded(context, model)
    assert row.ok, row


def test_a_step_waits_twice(tmp_path):
    model = instantiate(PLAN.training.load().model).to(DEVICE).train()
    images = random_images(PLAN.compared_size, model.num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loop = DetectionTrainLoop(model, [images] * 4, optimizer, device="cuda", log_period=100)
    with EventStorage(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for mode in ("default", "warn"):  # what is kept from the first step waits there
            torch.cuda.set_sync_debug_mode(mode)
            try:
                loop.run_step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    places = [Path(w.filename) for w in caught if "synchroniz" in str(w.message)]
    assert [path.name for path in places if path.parent.name != "cuda"] == [
        "matcher.py",
        "train_loop.py",
    ]


def test_answers_on_the_host_wait_no_longer_for_more_images():
    detector = detector_in_form(PLAN.models[0], "gather", DEVICE).eval()

    def answer(count):
        """The answers, and how often they wait for the device."""
        images = random_images(PLAN.compared_size, detector.num_classes)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = detector([images[0]] * count)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(w.message) for w in caught)
        return [x["instances"] for x in found], waits

    expected, waits_of_images = answer(4)
    with detector.answering_on_host():
        _, waits_of_one = answer(1)
        found, waits = answer(4)
    assert waits == waits_of_one < waits_of_images
    for a, b in zip(found, expected):
        assert a.scores.device.type == "cpu" and b.scores.is_cuda
        assert torch.equal(a.scores, b.scores.cpu())
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor.cpu())


def test_equal_runs_end_with_equal_weights(tmp_path):
    plan = replace(PLAN, repeated_steps=8)
    context = Context(plan, DEVICE, tmp_path, lambda part: part, time.monotonic() + 600)
    first, second = weights_of_two_runs(context, plan.repeated[0])
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
