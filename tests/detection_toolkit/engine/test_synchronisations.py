"""How often a training step waits for the device: a read of one of its tensors does."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from small_runs import make_batch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from detection_toolkit.config import get_config
from detection_toolkit.engine import device_scalars
from detection_toolkit.engine.device_scalars import DeviceScalars
from detection_toolkit.engine.train_loop import DetectionTrainLoop

# Python's ways to numbers, and operators whose result has a size that depends on numbers.
READS = {torch.Tensor.tolist, torch.Tensor.cpu}
OPERATORS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
# What is read there is on the host: sizes of images, and classes as the loader yields them.
ON_HOST = {("image_list.py", "from_tensors"), ("detector.py", "prepare_ground_truth")}


def place():
    """File and function of this project, or of Detectron2, that the call comes from."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if {"projects", "detectron2"} & set(path.parts) and "torch" not in path.parts:
            return path.name, frame.f_code.co_name
        frame = frame.f_back
    return "", ""


class _Operators(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indexed = function is torch.ops.aten.index.Tensor and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if function in OPERATORS or indexed:
            self.found.append(place())
        return function(*args, **(kwargs or {}))


class CountReads(TorchFunctionMode):
    """Notes where a tensor is read."""

    def __enter__(self):
        self.found = []
        self.operators = _Operators(self.found)
        self.operators.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.operators.__exit__(*args)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READS:
            self.found.append(place())
        return function(*args, **(kwargs or {}))

    def on_device(self):
        return Counter(x for x in self.found if x not in ON_HOST)


def reads_of_a_step(loop, iteration):
    loop.iter = iteration
    with EventStorage(iteration), CountReads() as reads:
        loop.run_step()
    return reads.on_device()


def make_loop(config, tmp_path, **kwargs):
    torch.manual_seed(0)
    model = instantiate(get_config(config).model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batches = [make_batch([2, 0, 3], seed=i) for i in range(8)]
    kwargs = {"log_period": 3, "clip_norm": 1.0, **kwargs}
    return DetectionTrainLoop(
        model, batches, optimizer, device="cpu", output_dir=str(tmp_path), **kwargs
    )


def test_the_stub_sees_every_way_to_read():
    x = torch.ones(3)
    ways = [
        lambda: x[0].item(),
        lambda: float(x[0]),
        lambda: bool(x[0]),
        lambda: int(x[0]),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: [1, 2][x[0].long()],
    ]
    for way in ways:
        with CountReads() as reads:
            way()
        assert reads.found


@pytest.mark.parametrize(
    "config",
    [
        "stageinteractor/shapes_tiny.py",
        "adamixer/adamixer_shapes_tiny.py",
        "sqr/adamixer_sqr_shapes_tiny.py",
    ],
)
def test_a_step_waits_twice_and_once_more_when_it_logs(config, tmp_path):
    loop = make_loop(config, tmp_path)
    twice = {("matcher.py", "forward"): 1, ("train_loop.py", "_check_losses"): 1}
    for iteration in range(6):
        expected = Counter(twice)
        if iteration % 3 == 2:
            expected["device_scalars.py", "flush"] = 1
        assert reads_of_a_step(loop, iteration) == expected


def test_with_accumulation_every_matching_waits_and_the_check_once(tmp_path):
    loop = make_loop("stageinteractor/shapes_tiny.py", tmp_path, accumulation_steps=2)
    # Each batch is matched for the counts of all, and for its losses.
    expected = {("matcher.py", "forward"): 4, ("train_loop.py", "_check_losses"): 1}
    assert reads_of_a_step(loop, 0) == expected


def test_scalars_that_are_read_later_are_those_of_their_steps(tmp_path):
    histories = []
    for period in (1, 3):
        loop = make_loop("stageinteractor/shapes_tiny.py", tmp_path, log_period=period)
        with EventStorage() as storage:
            for iteration in range(5):
                loop.iter = storage.iter = iteration
                loop.run_step()
            assert ("total_loss" in storage.latest()) and (
                storage.latest()["total_loss"][1] == (4 if period == 1 else 2)
            )
            loop.write_scalars()
            histories.append(
                {k: v.values() for k, v in storage.histories().items() if "time" not in k}
            )
    assert histories[0] == histories[1]
    assert {"stage0/matched_accuracy", "stage3/cls", "total_loss", "grad_norm"} <= set(histories[0])
    assert [iteration for _, iteration in histories[0]["total_loss"]] == [0, 1, 2, 3, 4]


def test_several_processes_exchange_scalars_only_where_they_log(monkeypatch):
    """Here the other process has twice the values of this one."""
    exchanges = []

    def all_reduce(values, op):
        exchanges.append(op)
        values *= 3 if op == dist.ReduceOp.SUM else 2

    monkeypatch.setattr(device_scalars.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(device_scalars.comm, "get_world_size", lambda: 2)
    scalars, written = DeviceScalars(), []

    def note(values, iteration):
        written.append((iteration, values))

    def add_steps():
        for iteration in range(2):
            one = torch.tensor([1.0 + iteration])
            scalars.add(["loss"], one, iteration=iteration, write=note, reduction="mean")
            scalars.add(["seconds"], one, iteration=iteration, write=note, reduction="max")
            scalars.add(["own"], one, iteration=iteration, write=note)
            scalars.add(["of another"], one, iteration=iteration, write=None, reduction="mean")

    add_steps()
    assert exchanges == []
    scalars.flush()
    assert exchanges == [dist.ReduceOp.SUM, dist.ReduceOp.MAX]
    assert written == [
        *((0, {"loss": 1.5}), (0, {"seconds": 2.0}), (0, {"own": 1.0})),
        *((1, {"loss": 3.0}), (1, {"seconds": 4.0}), (1, {"own": 2.0})),
    ]
    add_steps()
    scalars.flush(alone=True)
    assert len(exchanges) == 2
    assert written[-1] == (1, {"own": 2.0})
    assert written[-3] == (1, {"loss": 2.0})
