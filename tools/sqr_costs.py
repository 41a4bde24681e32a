#!/usr/bin/env python
"""Cost of a training step by recollection schedule, against that of the plain detector.

    python tools/sqr_costs.py --config-file sqr/adamixer_sqr_shapes_tiny.py --image-size 160 160

Trains a few steps on random images for each schedule and way of running the groups, each in a
process of its own, and prints a table in Markdown: supervisions of a step, seconds (forward,
backward, update; median over --steps, after one step to warm up), and the most memory that a
further step takes beyond weights and optimiser, gradients included; both also as multiples of
those of the schedule none.

On a GPU seconds are those of the clock; on a CPU they are CPU seconds of one thread, which other
work on the machine disturbs least. KEY=VALUE arguments override entries of the config.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import LazyCall, instantiate
from detectron2.structures import Boxes, Instances

from sqr import (
    RecollectionDetector,
    RecollectionSchedule,
    dense_schedule,
    plain_schedule,
    selective_schedule,
)
from stageinteractor.config import apply_overrides, get_config

# How the groups are run: (model.batched, model.execution.checkpoint).
MODES = {
    "batched": (True, False),
    "sequential": (False, False),
    "batched, checkpoint": (True, True),
    "sequential, checkpoint": (False, True),
}
DEVICES = ("cpu", "cuda")


class Cost(NamedTuple):
    """Of one training step."""

    seconds: float
    memory: float
    """MiB."""


def make_schedule(name: str, num_stages: int) -> RecollectionSchedule:
    """``none``, ``selective``, ``dense``, or ``late1``, ``late2``, ...

    Raises:
        ValueError: an unknown name, or a late start that leaves no stage.
    """
    if name == "none":
        return plain_schedule(num_stages)
    if name == "dense":
        return dense_schedule(num_stages)
    late_start = name[len("late") :] if name.startswith("late") else ""
    if name != "selective" and not late_start.isdigit():
        raise ValueError(f"{name!r} is no schedule: choose none, selective, dense or late<number>")
    return selective_schedule(num_stages, late_start=int(late_start or 0))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="sqr/adamixer_sqr_shapes_tiny.py")
    parser.add_argument(
        "--schedules",
        nargs="+",
        default=["none", "selective", "late1", "late2", "dense"],
        metavar="NAME",
        help="none, selective, dense, late<number> (default: %(default)s)",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["batched"])
    parser.add_argument("--images", type=int, default=2, help="a step (default: %(default)s)")
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=[160, 160], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--objects", type=int, default=7, help="an image (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="measured (default: %(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="entries of the config")
    args = parser.parse_intermixed_args(argv)
    if min(args.images, args.steps, *args.image_size) < 1 or args.objects < 0:
        parser.error("--images, --steps and --image-size must be positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    args.schedules = ["none", *(name for name in args.schedules if name != "none")]
    return args


def random_batch(images: int, size: tuple[int, int], objects: int, classes: int) -> list[dict]:
    """Images of noise with random objects, in Detectron2's format."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    batch = []
    for _ in range(images):
        corners = torch.rand(objects, 2, 2, generator=generator).sort(1).values
        boxes = (corners * torch.tensor([width, height])).flatten(1)
        instances = Instances(
            size,
            gt_boxes=Boxes(boxes),
            gt_classes=torch.randint(classes, (objects,), generator=generator),
        )
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def configure(args: argparse.Namespace, schedule: str, mode: str) -> Any:
    """The config with this recollection in the place of its own.

    Raises:
        ValueError: an unknown schedule.
    """
    cfg = apply_overrides(get_config(args.config_file), args.overrides)
    batched, cfg.model.execution.checkpoint = MODES[mode]
    cfg.model.update(
        _target_=RecollectionDetector,
        schedule=LazyCall(make_schedule)(name=schedule, num_stages="${..decoder.num_stages}"),
        batched=batched,
    )
    return cfg


def measure(args: argparse.Namespace, schedule: str, mode: str) -> Cost:
    """Train a few steps in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cfg = configure(args, schedule, mode)
    detector = instantiate(cfg.model).to(args.device).train()
    cfg.optimizer.params.model = detector
    optimizer = instantiate(cfg.optimizer)
    batch = random_batch(args.images, tuple(args.image_size), args.objects, detector.num_classes)

    def step() -> None:
        optimizer.zero_grad()
        sum(detector(batch).values()).backward()
        optimizer.step()

    step()  # allocates the optimiser's state, too
    optimizer.zero_grad()
    meter = GpuMeter() if args.device == "cuda" else CpuMeter()
    seconds = []
    for _ in range(args.steps):
        begin = meter.seconds()
        step()
        seconds.append(meter.seconds() - begin)
    optimizer.zero_grad()
    return Cost(statistics.median(seconds), meter.peak_memory(step))


class GpuMeter:
    """Seconds by the clock; memory that PyTorch has allocated."""

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak_memory(self, step: Callable[[], None]) -> float:
        """MiB that a step takes at most, beyond what is in use before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class CpuMeter:
    """CPU seconds; resident memory."""

    M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

    def seconds(self) -> float:
        return time.process_time()

    def peak_memory(self, step: Callable[[], None]) -> float:
        """MiB that a step takes at most, beyond what is in use before."""
        gc.collect()
        with suppress(AttributeError, OSError):
            # glibc keeps much of what is freed, which then would not count. From here on it hands
            # memory back at once; that costs time, so times are measured before.
            libc = ctypes.CDLL(None)
            libc.mallopt(self.M_MMAP_THRESHOLD, 2**16)
            libc.malloc_trim(0)
        is_new_peak = False
        with suppress(OSError):  # Linux alone can begin a new peak
            Path("/proc/self/clear_refs").write_text("5")
            is_new_peak = True
        before = self._peak(is_new_peak)
        step()
        return self._peak(is_new_peak) - before

    @staticmethod
    def _peak(is_new_peak: bool) -> float:
        if is_new_peak:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def table_row(name: str, mode: str, groups: int, cost: Cost, baseline: Cost) -> str:
    return (
        f"| {name} | {mode} | {groups} | {cost.seconds:.2f} | "
        f"{cost.seconds / baseline.seconds:.2f} | {cost.memory:.0f} | "
        f"{cost.memory / baseline.memory:.2f} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        # What is wrong with a schedule or an override is said before anything is measured.
        stages = configure(args, "none", "batched").model.decoder.num_stages
        schedules = {name: make_schedule(name, stages) for name in args.schedules}
    except (FileNotFoundError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    height, width = args.image_size
    print(f"{args.config_file}, {args.images} images of {height} x {width}, {args.device}\n")
    print("| schedule | groups run | supervisions | s | x none | MiB | x none |")
    print("|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    baseline = None
    for name, schedule in schedules.items():
        for mode in args.modes:
            if name == "none" and mode != args.modes[0]:
                continue  # one group a stage is the same either way
            with context.Pool(1) as pool:
                cost = pool.apply(measure, (args, name, mode))
            baseline = baseline or cost
            row = table_row(name, mode, schedule.num_groups, cost, baseline)
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
