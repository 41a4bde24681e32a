"""The page of all benchmarks: ratios first, and nothing hides a benchmark that fails."""

from __future__ import annotations

import pytest
from benchmarks import __main__ as benchmark_page
from benchmarks.__main__ import Benchmark, Outcome, decoder_rows, main, page
from benchmarks.rows import Row, read_rows, write_rows


def test_ratios_stand_before_what_was_printed():
    rows = [Row("a step", "plain", 1.5, 0.5), Row("an inference", "plain", 2.0)]
    text = page({"decoder": Outcome("python x.py", rows, "the details", 3.2, failed=False)})
    assert "| a step | plain | 1.50 | 0.50 | decoder |" in text
    assert "| an inference | plain | 2.00 |  | decoder |" in text
    assert text.index("an inference") < text.index("## decoder: 3 s") < text.index("the details")


def test_a_benchmark_that_fails_is_a_row_and_an_exit_code(monkeypatch, tmp_path, capsys):
    broken = Benchmark("-m benchmarks.coco_backends", "--images none")
    monkeypatch.setattr(benchmark_page, "BENCHMARKS", {"metrics": broken})
    output = tmp_path / "page.md"
    assert main(["--output", str(output), "--only", "metrics"]) == 1
    assert "| metrics | failed, see below | | | metrics |" in output.read_text()
    assert "invalid int value: 'none'" in capsys.readouterr().out


def test_the_quick_page_leaves_out_what_takes_long(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark_page, "BENCHMARKS", {"long": Benchmark("-m benchmarks.none")})
    assert main(["--quick", "--output", str(tmp_path / "page.md"), "--only", "long"]) == 0
    assert "long ... not in the quick page" in capsys.readouterr().err


def test_rows_of_the_decoder_have_its_memory():
    sizes = {"plain": 4e9, "ours": 3e9, "checkpointed": 1e9}
    results = {
        "config": "stageinteractor/tiny.py",
        "cells": {
            "decoder, inference": {"plain": 3.0, "ours": 2.0, "compiled": 1.0, "ResNet-50": 9.0},
            "decoder + criterion, training step": {"plain": 6.0, "ours": 4.0},
        },
        "memory": {form: {"above_interpreter": size} for form, size in sizes.items()},
    }
    plain = "plain transcription"
    assert decoder_rows(results) == [
        Row("tiny: decoder, inference", plain, 1.5),
        Row("tiny: decoder, inference, compiled", plain, 3.0),
        Row("tiny: decoder + criterion, training step", plain, 1.5, 0.75),
    ]


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [Row("a", "b", 1.25, 0.5), Row("c", "d", 2.0)]
    write_rows(tmp_path / "rows.json", rows)
    assert read_rows(tmp_path / "rows.json") == rows


@pytest.mark.parametrize("name", benchmark_page.BENCHMARKS)
def test_each_benchmark_says_which_rows_file_it_takes(name):
    """Its script is there, and knows the option by which the page reads its figures."""
    command = benchmark_page.BENCHMARKS[name].command.split()
    if command[0] == "-m":
        path = benchmark_page.ROOT / (command[1].replace(".", "/") + ".py")
        assert "add_rows_argument(parser)" in path.read_text()
    else:
        assert '"--json"' in (benchmark_page.ROOT / command[0]).read_text()
