#!/usr/bin/env python3
"""Time a detector from JPEG files to Instances, in images/s, against its plain form.

    python -m benchmarks.end_to_end [--batch-sizes 1 8] [--files A.jpg B.jpg]

``Predictor.predict`` reads, resizes and detects. In the plain form all of ``model.execution`` is
switched off, and freed memory goes back to the system as glibc does it by itself. Each form has a
process of its own, and both take turns. Without files, smooth random pictures of 640x480 are used.
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
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from benchmarks.rows import Row, add_rows_argument, write_rows

CONFIG = "stageinteractor/stageinteractor_r50_100q_1x.py"
PLAIN = ("sampling=grid", "mixing=direct", "channels_last=false", "fold_norms=false")
WITHOUT_WEIGHTS = ("train.device=cpu", "train.init_checkpoint=''", "train.allow_partial=true")
FORMS: dict[str, tuple[str, ...]] = {
    "plain": tuple(f"model.execution.{change}" for change in PLAIN),
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


def work(config: str, threads: int, changes: Sequence[str], files: Sequence[str]) -> None:
    """Detect in all files with batches of the size that each line of the input gives."""
    import torch

    from detection_toolkit.config import apply_overrides, get_config
    from detection_toolkit.engine import Predictor

    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    cfg = apply_overrides(get_config(config), [*WITHOUT_WEIGHTS, *changes])
    predictor = Predictor(cfg)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in predictor.predict(files, batch_size=int(line)):
            pass
        print("seconds", time.perf_counter() - start, flush=True)


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

    def seconds(self, batch_size: int) -> float:
        """For all files."""
        print(batch_size, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise OSError(f"the process that detects has ended with exit code {self._process.wait()}")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(
    arguments: Sequence[str], files: Sequence[str], batch_sizes: Sequence[int], rounds: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds of each round, by batch size and form."""
    workers = {form: Worker(form, arguments, files) for form in FORMS}
    found: dict[int, dict[str, list[float]]] = {}
    try:
        for size in batch_sizes:
            found[size] = {form: [] for form in FORMS}
            for i in range(1 + rounds):
                for form, worker in workers.items():
                    seconds = worker.seconds(size)
                    if i:  # the first warms up
                        found[size][form].append(seconds)
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
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--work", choices=FORMS, help=argparse.SUPPRESS)
    add_rows_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.work:
        return work(args.config, args.threads, FORMS[args.work], args.files)
    own = ["--config", args.config, "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        files = args.files or write_pictures(Path(folder), args.pictures)
        found = measure(own, files, args.batch_sizes, args.rounds)
    rows = []
    print(f"{'images':>8}{'plain':>14}{'ours':>14}  times as fast")
    for size, forms in found.items():
        rates = {form: len(files) / statistics.median(forms[form]) for form in FORMS}
        ratio = statistics.median(a / b for a, b in zip(forms["plain"], forms["ours"]))
        print(f"{size:8d}{rates['plain']:10.2f} /s{rates['ours']:11.2f} /s{ratio:14.2f}")
        images = "one image" if size == 1 else f"{size} images"
        rows.append(Row(f"from JPEG to Instances, {images} at a time", "all switched off", ratio))
    write_rows(args.rows, rows)


if __name__ == "__main__":
    main()
