"""Cases computed with the authors' implementations, cut down to fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from detection_toolkit.modeling import Execution
from detection_toolkit.modeling.execution import PLAIN
from detection_toolkit.parity import Settings, check_case

DATA = Path(__file__).resolve().parents[1] / "data"
TWO_STAGE = "deformable_detr_two_stage_2stages"
CROSS_STAGE = "deformable_detr_cross_stage_head"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [TWO_STAGE, CROSS_STAGE])
def test_the_released_numbers_are_met(name, dtype):
    report = check_case(DATA / f"{name}.npz", Settings(dtype=dtype))
    assert report.ok, [row for row in report.rows if not row.ok]
    assert len(report.rows) > 20


def test_the_plain_form_meets_them_too():
    execution = Execution(**PLAIN)
    report = check_case(DATA / f"{TWO_STAGE}.npz", Settings(execution=execution))
    assert report.ok, [row for row in report.rows if not row.ok]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        (TWO_STAGE, "infer/hs"),
        (TWO_STAGE, "infer/enc_boxes"),
        (TWO_STAGE, "train/enc_assigned_gt"),
        (TWO_STAGE, "train/losses/enc_loss_cls"),
        (CROSS_STAGE, "release_like/soft_labels"),
        (CROSS_STAGE, "own_last/grad_boxes"),
    ],
)
def test_an_altered_reference_is_noticed(name, array, tmp_path):
    with np.load(DATA / f"{name}.npz") as archive:
        arrays = dict(archive)
    altered = arrays[array].copy()
    altered.reshape(-1)[0] += 1
    np.savez(tmp_path / "altered.npz", **{**arrays, array: altered})
    report = check_case(tmp_path / "altered.npz", Settings())
    assert [row.quantity for row in report.rows if not row.ok] == [array]
