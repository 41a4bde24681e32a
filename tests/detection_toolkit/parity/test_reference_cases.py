"""Every quantity of the committed reference cases, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_parity import main

DATA = Path(__file__).resolve().parents[2] / "data"
CASES = sorted(path.name for path in DATA.glob("*.npz"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_case_agrees(name, dtype, capsys):
    status = main([str(DATA / name), "--dtype", dtype, "--summary"])
    table = capsys.readouterr().out
    assert status == 0, table
    assert "FAIL" not in table
    assert "1 cases" in table and "0 out of tolerance" in table


@pytest.mark.parametrize("form", ["direct", "plain"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("forward", "train"))])
def test_case_agrees_without_optimisations_and_in_the_plain_transcription(name, form, capsys):
    status = main([str(DATA / name), "--form", form, "--summary"])
    assert status == 0, capsys.readouterr().out


def test_every_kind_of_case_is_there():
    marks = ("forward", "train", "assigner", "swin", "adamixer_forward", "adamixer_train")
    assert all(any(mark in name for name in CASES) for mark in marks)
    assert sum(path.stat().st_size for path in DATA.rglob("*.*")) <= 12e6


def test_released_wiring_agrees_without_the_closer_look_at_rounding(capsys):
    # In float64, as every machine rounds float32 in its own way.
    main([str(DATA / "forward_reuse3.npz"), "--dtype", "float64"])
    assert "(0 of them after a look at rounding)" in capsys.readouterr().out


def test_rows_name_case_quantity_differences_and_verdict(capsys):
    main([str(DATA / "forward_reuse3.npz")])
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if " stage3/sample_xy " in line)
    assert row[0] == "forward_reuse3"
    assert 0 < float(row[2]) < 5e-3 and 0 < float(row[3]) < 1e-4
    assert row[-1] == "ok"


def test_half_precision_reports_drift_without_limits(capsys):
    status = main([str(DATA / "forward_reuse3.npz"), "--autocast", "bfloat16", "--summary"])
    table = capsys.readouterr().out
    assert status == 0
    assert "ok (drift)" in table
    row = next(line.split() for line in table.splitlines() if " stage*/cls_score " in line)
    assert float(row[3]) > 1e-4  # bfloat16 has 8 bits
