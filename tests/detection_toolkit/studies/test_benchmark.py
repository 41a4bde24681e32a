"""The benchmark on the tiny model: every figure is there, and what it compares is the same."""

from __future__ import annotations

import copy
import json

import benchmark
import pytest
import torch
from benchmarks.plain import to_plain
from small_runs import SMALL_MODEL, make_batch, make_detector

from detection_toolkit.studies import benchmark as benchmarking
from detection_toolkit.studies.parts import Part, count_operations
from detection_toolkit.studies.timing import alternate

ARGUMENTS = ["--config-file", "stageinteractor/shapes_tiny.py", "--image-size", "64", "96"]
ARGUMENTS += ["--device", "cpu", "--rounds", "1", "--threads", "1"]


@pytest.fixture
def without_other_processes(monkeypatch):
    sizes = {"plain": 4e9, "ours": 3e9, "checkpointed": 1e9}
    memory = {form: {"peak": x + 1e9, "above_interpreter": x} for form, x in sizes.items()}
    monkeypatch.setattr(benchmarking, "memory_of_forms", lambda command: memory)
    monkeypatch.setattr(benchmarking, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(benchmarking, "product_rate", lambda *_: 1e11)
    monkeypatch.setattr(benchmarking, "copy_rate", lambda *_: 1e10)
    monkeypatch.setattr(benchmarking, "QUERY_CURVE", (3, 6))
    monkeypatch.setattr(benchmarking, "STAGE_CURVE", (3, 4))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_every_figure_is_measured(without_other_processes, tmp_path, capsys):
    path = tmp_path / "figures" / "benchmark.json"
    assert benchmark.main([*ARGUMENTS, "--json", str(path), *SMALL_MODEL]) == 0
    table = capsys.readouterr().out
    assert (
        "| peak memory of a training step, decoder + criterion | 4.00 GB | 3.00 GB | 0.75" in table
    )
    results = json.loads(path.read_text())
    for name, cell in results["cells"].items():
        assert all(seconds > 0 for seconds in cell.values()), name
        assert f"| {name} |" in table
    parts = {part["name"]: part for part in results["parts"]}
    for name in ("backbone", "neck", "attention", "sampling", "mixing", "FFN and heads"):
        assert parts[name]["seconds"] > 0 and parts[name]["bytes"] > 0
        assert parts[name]["bound"] >= parts[name]["bytes"] / 1e10
    assert parts["mixing"]["operations"] > parts["attention"]["operations"] > 0
    assert (
        results["curves"]["queries"][1]["operations"]
        > results["curves"]["queries"][0]["operations"]
    )
    assert (
        results["curves"]["stages"][1]["operations"] > results["curves"]["stages"][0]["operations"]
    )
    assert results["detector"]["images_per_second"] > 0


def test_memory_of_a_step_is_measured_in_this_process(capsys):
    threads = torch.get_num_threads()
    assert benchmark.main([*ARGUMENTS, "--memory-of", "plain", *SMALL_MODEL]) == 0
    torch.set_num_threads(threads)
    memory = json.loads(capsys.readouterr().out)
    assert memory["peak"] > memory["above_interpreter"] >= 0
    assert memory["peak"] > 50e6


def test_the_plain_form_of_a_whole_detector_has_its_losses_and_gradients():
    ours = make_detector()
    plain = to_plain(copy.deepcopy(ours))
    batch = make_batch([2, 3])
    results = []
    for detector in (ours, plain):
        losses = detector.train()(batch)
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    (losses, gradients), (plain_losses, plain_gradients) = results
    for name, loss in losses.items():
        torch.testing.assert_close(plain_losses[name], loss)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(plain_gradients[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_what_has_no_plain_form_is_an_error():
    with pytest.raises(ValueError, match="Linear has no part with a plain form"):
        to_plain(torch.nn.Linear(2, 2))


def test_functions_take_turns_and_warm_up_does_not_count():
    calls = []
    seconds = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        device=torch.device("cpu"),
        rounds=2,
        warm_up=1,
    )
    assert calls == ["a", "b"] * 3
    assert seconds.keys() == {"a", "b"}


def test_bounds_and_operations():
    linear = torch.nn.Linear(8, 4)
    assert count_operations(lambda: linear(torch.zeros(3, 8))) == 2 * 3 * 8 * 4
    part = Part("", 1.0, operations=100.0, bytes=10.0)
    assert part.bound(product_rate=10.0, copy_rate=10.0) == 10.0
    assert part.bound(product_rate=1000.0, copy_rate=2.0) == 5.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--image-size", "8", "800"], "at least 32 pixels"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_key_is_one_line():
    with pytest.raises(SystemExit, match="model.execution.samplings"):
        benchmark.main([*ARGUMENTS, "model.execution.samplings=grid"])
