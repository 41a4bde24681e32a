"""The cost table's command line."""

from __future__ import annotations

import pytest
import torch
from small_runs import SMALL_MODEL
from sqr_costs import MODES, main, make_schedule, measure, parse_args

from sqr import dense_schedule, plain_schedule, selective_schedule

OPTIONS = ["--config-file", "stageinteractor/shapes_tiny.py", "--steps", "1", "--images", "1"]
OPTIONS += ["--image-size", "64", "64", *SMALL_MODEL]


def test_names_of_schedules():
    assert make_schedule("none", 6) == plain_schedule(6)
    assert make_schedule("dense", 6) == dense_schedule(6)
    assert make_schedule("selective", 6) == selective_schedule(6)
    assert make_schedule("late3", 6) == selective_schedule(6, late_start=3)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_costs_time_and_memory(mode):
    threads = torch.get_num_threads()
    try:
        cost = measure(parse_args(OPTIONS), "selective", mode)
    finally:
        torch.set_num_threads(threads)
    assert cost.seconds > 0 and cost.memory >= 0


def test_the_table_has_a_row_a_schedule(capsys):
    assert main([*OPTIONS, "--schedules", "dense"]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [["none", "batched", "3"], ["dense", "batched", "7"]]
    assert cells[0][4] == "1.00"
    assert float(cells[1][3]) > 0


@pytest.mark.parametrize("name", ["late2", "selectiv", "late", "late-1"])
def test_schedules_that_cannot_be_are_refused_before_anything_is_measured(name, capsys):
    assert main([*OPTIONS, "--schedules", name]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert ("stage 3" if name == "late2" else "is no schedule") in captured.err


def test_unknown_keys_are_refused(capsys):
    assert main([*OPTIONS, "model.decoder.stages=3"]) == 1
    assert "model.decoder.stages" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--steps", "0"], ["--image-size", "0", "64"]])
def test_bad_numbers_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        parse_args([*OPTIONS, *option])
    assert "must be positive" in capsys.readouterr().err
