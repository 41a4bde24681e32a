#!/usr/bin/env python3
"""Time a detector from JPEG files to Instances, and its training step, against its plain form.

    python -m benchmarks.end_to_end [--batch-sizes 1 8] [--files A.jpg B.jpg]

``Predictor.predict`` reads, resizes and detects; a step is forward, losses, backward and update of
two random images, with the memory of its process at most. In the plain form all of
``model.execution`` and the fused optimizer are switched off, and freed memory goes back to the
system as glibc does it by itself. Each form has a process of its own, and both take turns. Without
files, smooth random pictures of 640x480 are used.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from benchmarks.rows import Row, add_rows_argument, write_rows

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
FORMS: dict[str, tuple[str, ...]] = {
    "plain": (*(f"model.execution.{change}" for change in PLAIN), "optimizer.fused=false"),
    "ours": (),
}
# glibc's own value; where it is set, the project changes nothing.
ENVIRONMENT = {"plain": {"MALLOC_MMAP_MAX_": "65536"}, "ours": {}}


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
    keep_freed_memory()  # as commands do; not in the plain form, see ENVIRONMENT
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
        print("seconds", time.perf_counter() - start, resident_memory(peak=True), flush=True)


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
        sum(detector(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Worker:
    """A process that detects in one form."""

    def __init__(self, form: str, arguments: Sequence[str], files: Sequence[str]):
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.end_to_end", "--work", form),
                *(*arguments, "--files", *files),
            ],
            env={**os.environ, **ENVIRONMENT[form]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def cost(self, work: str) -> tuple[float, float]:
        """Seconds for all files in batches of so many, or of a step; most bytes so far."""
        print(work, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("seconds "):
                seconds, memory = line.split()[1:]
                return float(seconds), float(memory)
        raise OSError(f"the process that detects has ended with exit code {self._process.wait()}")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(
    arguments: Sequence[str], files: Sequence[str], works: Sequence[str], rounds: int
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Seconds and bytes of each round, by what was done and form."""
    workers = {form: Worker(form, arguments, files) for form in FORMS}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    try:
        for work in works:
            found[work] = {form: [] for form in FORMS}
            for i in range(1 + rounds):
                for form, worker in workers.items():
                    cost = worker.cost(work)
                    if i:  # the first warms up
                        found[work][form].append(cost)
    finally:
        for worker in workers.values():
            worker.end()
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
    parser.add_argument("--work", choices=FORMS, help=argparse.SUPPRESS)
    add_rows_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.work:
        return serve(args.config, args.threads, FORMS[args.work], args.files)
    own = ["--config", args.config, "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        files = args.files or write_pictures(Path(folder), args.pictures)
        works = [*map(str, args.batch_sizes), *(() if args.no_step else (STEP,))]
        found = measure(own, files, works, args.rounds)
    rows = []
    print(f"{'':>8}{'plain':>16}{'ours':>16}  times as fast")
    for work, forms in found.items():
        seconds = {form: statistics.median(s for s, _ in forms[form]) for form in FORMS}
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(forms["plain"], forms["ours"]))
        memory = None
        if work == STEP:
            cells = [f"{seconds[form]:.2f} s" for form in FORMS]
            what = "whole training step, two images"
            memory = forms["ours"][-1][1] / forms["plain"][-1][1]
        else:
            cells = [f"{len(files) / seconds[form]:.2f} images/s" for form in FORMS]
            images = "one image" if work == "1" else f"{work} images"
            what = f"from JPEG to Instances, {images} at a time"
        print(f"{work:>8}{cells[0]:>16}{cells[1]:>16}{ratio:14.2f}")
        rows.append(Row(what, "all switched off", ratio, memory))
    for form in FORMS if STEP in found else ():
        print(f"{form}: at most {found[STEP][form][-1][1] / 1e9:.2f} GB")
    write_rows(args.rows, rows)


if __name__ == "__main__":
    main()
