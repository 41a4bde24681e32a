#!/usr/bin/env python3
"""Time a detector from JPEG files to Instances, and its training step, against its plain form.

    python -m benchmarks.end_to_end [--batch-sizes 1 8] [--change KEY=VALUE]

``Predictor.predict`` reads, resizes and detects; a step is forward, losses, backward and update of
two random images, with the memory of its process at most. In the plain form all of
``model.execution`` and the fused optimizer are switched off, and freed memory goes back to the
system as glibc does it by itself; in the form "returned" only the latter is so. Each form has a
process of its own, and all take turns. Behind each figure stands how many times as fast as the
plain form it is. Without files, smooth random pictures of 640x480 are used.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from benchmarks.rows import Row, add_rows_argument, write_rows
from benchmarks.workers import Worker, answer

if TYPE_CHECKING:
    from omegaconf import DictConfig

STEP = "step"
OBJECTS, HEIGHT, WIDTH = 8, 800, 1333
CONFIG = "stageinteractor/stageinteractor_r50_100q_1x.py"
PLAIN = (
    "sampling=grid",
    "mixing=direct",
    "channels_last=false",
    "fold_norms=false",
    "products=torch",
)
WITHOUT_WEIGHTS = ("train.device=cpu", "train.init_checkpoint=''", "train.allow_partial=true")
# glibc's own value; where it is set, the project changes nothing.
RETURNED = {"MALLOC_MMAP_MAX_": "65536"}


class Form(NamedTuple):
    """Changes of the config, and of the environment."""

    overrides: tuple[str, ...] = ()
    environ: Mapping[str, str] = MappingProxyType({})


FORMS = {
    "plain": Form(
        (*(f"model.execution.{change}" for change in PLAIN), "optimizer.fused=false"), RETURNED
    ),
    "returned": Form(environ=RETURNED),
    "ours": Form(),
}


def write_pictures(folder: Path, count: int) -> list[str]:
    """Files of random pictures that compress about as photographs do."""
    generator = np.random.default_rng(0)
    files = []
    for i in range(count):
        noise = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        picture = cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
        files.append(str(folder / f"{i}.jpg"))
        cv2.imwrite(files[-1], picture)
    return files


def serve(config: str, threads: int, changes: Sequence[str], files: Sequence[str]) -> None:
    """Detect in all files with batches of the size that each line of the input gives, or train."""
    import torch

    from detection_toolkit.config import apply_overrides, get_config
    from detection_toolkit.engine import Predictor
    from detection_toolkit.memory import keep_freed_memory
    from detection_toolkit.studies.timing import resident_memory

    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    cfg = apply_overrides(get_config(config), [*WITHOUT_WEIGHTS, *changes])
    keep_freed_memory()  # as commands do; not where the environment says otherwise
    predictor = Predictor(cfg)
    step = None
    for line in sys.stdin:
        if line.strip() == STEP and step is None:
            step = training_step(cfg)
        start = time.perf_counter()
        if step is not None:
            step()
        else:
            for _ in predictor.predict(files, batch_size=int(line)):
                pass
        answer(time.perf_counter() - start, resident_memory(peak=True))


def training_step(cfg: DictConfig) -> Callable[[], None]:
    """Of two images of the config's size with a few boxes each."""
    import torch
    from detectron2.config import instantiate
    from detectron2.structures import Boxes, Instances

    torch.manual_seed(0)
    detector = instantiate(cfg.model).train()
    cfg.optimizer.params.model = detector
    optimizer = instantiate(cfg.optimizer)
    corner = torch.rand(OBJECTS, 2) * torch.tensor([WIDTH, HEIGHT]) * 0.7
    size = torch.rand(OBJECTS, 2) * torch.tensor([WIDTH, HEIGHT]) * 0.25 + 16
    truth = Instances((HEIGHT, WIDTH))
    truth.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
    truth.gt_classes = torch.randint(80, (OBJECTS,))
    image = torch.randint(256, (3, HEIGHT, WIDTH)).float()
    batch = [
        {"image": image, "instances": truth, "height": HEIGHT, "width": WIDTH, "image_id": i}
        for i in range(2)
    ]

    def step() -> None:
        losses = detector(batch)
        with detector.products_of_backward():  # as the trainer does
            sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    workers: Mapping[str, Worker], works: Sequence[str], rounds: int
) -> dict[str, dict[str, list[list[float]]]]:
    """Seconds and bytes of each round, by what was done and form."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for work in works:
        found[work] = {form: [] for form in workers}
        for i in range(1 + rounds):
            for form, worker in workers.items():
                cost = worker.measure(work)
                if i:  # the first warms up
                    found[work][form].append(cost)
    return found


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=CONFIG, help="default: %(default)s")
    parser.add_argument("--files", nargs="+", metavar="FILE", help="pictures to detect in")
    parser.add_argument("--pictures", type=int, default=8, help="without files (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--no-step", action="store_true", help="leave out the training step")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--change",
        nargs="+",
        metavar="KEY=VALUE",
        help="of the config: one more form, ours with these changes",
    )
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    add_rows_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.work is not None:
        return serve(args.config, args.threads, args.work, args.files)
    forms = dict(FORMS)
    if args.change:
        forms["changed"] = Form(tuple(args.change))
    works = [*map(str, args.batch_sizes), *(() if args.no_step else (STEP,))]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = args.files or write_pictures(Path(folder), args.pictures)
        own = ["--config", args.config, "--threads", str(args.threads), "--files", *files]
        workers = {}
        for name, form in forms.items():
            arguments = [*own, "--work", *form.overrides]
            workers[name] = Worker("benchmarks.end_to_end", arguments, form.environ)
            stack.callback(workers[name].end)
        found = measure(workers, works, args.rounds)
    rows = []
    print(f"{'':8}" + "".join(f"{name:>24}" for name in forms))
    for work, costs in found.items():
        images = "one image" if work == "1" else f"{work} images"
        what = f"from JPEG to Instances, {images} at a time"
        if work == STEP:
            what = "whole training step, two images"
        cells, ratios = [], {}
        for name, of_form in costs.items():
            seconds = statistics.median(s for s, _ in of_form)
            pairs = zip(costs["plain"], of_form)
            ratios[name] = statistics.median(a / b for (a, _), (b, _) in pairs)
            text = f"{seconds:.2f} s" if work == STEP else f"{len(files) / seconds:.2f} images/s"
            cells.append(f"{text:>15} ({ratios[name]:5.2f})")
        print(f"{work:8}" + "".join(f"{cell:>24}" for cell in cells))
        memory = {name: of_form[-1][1] for name, of_form in costs.items()}
        if work == STEP:
            print(f"{'GB':8}" + "".join(f"{memory[name] / 1e9:24.2f}" for name in forms))
        share = memory["ours"] / memory["plain"] if work == STEP else None
        rows.append(Row(what, "all switched off", ratios["ours"], share))
    write_rows(args.rows, rows)


if __name__ == "__main__":
    main()
