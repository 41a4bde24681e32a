"""What only a GPU can show: forms agree there, and equal runs end with equal weights."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

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


def test_equal_runs_end_with_equal_weights(tmp_path):
    plan = replace(PLAN, repeated_steps=8)
    context = Context(plan, DEVICE, tmp_path, lambda part: part, time.monotonic() + 600)
    (first, second), _ = weights_of_two_runs(context)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
