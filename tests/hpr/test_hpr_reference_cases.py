"""Cases computed with the authors' implementation, cut down to fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from detection_toolkit.modeling import Execution
from detection_toolkit.parity import Settings, check_case

CASE = Path(__file__).resolve().parents[1] / "data" / "hpr" / "blocks.npz"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_released_numbers_are_met(dtype):
    report = check_case(CASE, Settings(dtype=dtype))
    assert report.ok, [row for row in report.rows if not row.ok]
    assert len(report.rows) > 30


def test_the_plain_form_meets_them_too():
    execution = Execution(sampling="grid", mixing="direct")
    report = check_case(CASE, Settings(execution=execution))
    assert report.ok, [row for row in report.rows if not row.ok]


@pytest.mark.parametrize(
    "array",
    [
        "roi/levels",
        "roi/out/feats",
        "roi/grad_in/map1",
        "regional_ca/key_pos",
        "regional_ca/grad/attn.in_proj_weight",
        "merge_learnable/grad/weights",
        "box_encoding/enc",
    ],
)
def test_an_altered_reference_is_noticed(array, tmp_path):
    with np.load(CASE) as archive:
        arrays = dict(archive)
    altered = arrays[array].copy()
    altered.reshape(-1)[0] += 1
    np.savez(tmp_path / "altered.npz", **{**arrays, array: altered})
    report = check_case(tmp_path / "altered.npz", Settings())
    assert [row.quantity for row in report.rows if not row.ok] == [array]
