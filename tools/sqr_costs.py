#!/usr/bin/env python
"""Cost of a training step by recollection schedule, against that of the plain detector.

    python tools/sqr_costs.py --config-file sqr/adamixer_sqr_shapes_tiny.py --image-size 160 160

Trains a few steps on random images for each schedule and way of running the groups, each in a
process of its own, and prints a table in Markdown: supervisions of a step, seconds (forward,
backward, update; median over --steps, after one step to warm up), and the most memory that PyTorch
allocates in a further step, gradients included, weights and optimiser not; both also as multiples
of those of the schedule none.

On a GPU seconds are those of the clock; on a CPU they are CPU seconds of one thread, which other
work on the machine disturbs least. KEY=VALUE arguments override entries of the config.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall, instantiate
from detectron2.structures import Boxes, Instances

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.steps import StepCost, call_in_process, cost_of_a_step  # noqa: E402

from detection_toolkit.config import apply_overrides, get_config  # noqa: E402
from detection_toolkit.errors import UserError
from sqr import (  # noqa: E402
    QueryRecollection,
    RecollectionSchedule,
    dense_schedule,
    plain_schedule,
    selective_schedule,
)

# How the groups are run: (model.decoder.route.batched, model.execution.checkpoint).
MODES = {
    "batched": (True, False),
    "sequential": (False, False),
    "batched, checkpoint": (True, True),
    "sequential, checkpoint": (False, True),
}
DEVICES = ("cpu", "cuda")


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
        raise UserError(f"{name!r} is no schedule: choose none, selective, dense or late<number>")
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
    cfg.model.decoder.route = LazyCall(QueryRecollection)(
        schedule=LazyCall(make_schedule)(name=schedule, num_stages="${...num_stages}"),
        batched=batched,
    )
    return cfg


def measure(args: argparse.Namespace, schedule: str, mode: str) -> StepCost:
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

    return cost_of_a_step(step, optimizer.zero_grad, device=args.device, steps=args.steps)


def table_row(name: str, mode: str, groups: int, cost: StepCost, baseline: StepCost) -> str:
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
    baseline = None
    for name, schedule in schedules.items():
        for mode in args.modes:
            if name == "none" and mode != args.modes[0]:
                continue  # one group a stage is the same either way
            cost = call_in_process(measure, args, name, mode)
            baseline = baseline or cost
            row = table_row(name, mode, schedule.num_groups, cost, baseline)
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
