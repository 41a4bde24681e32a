#!/usr/bin/env python3
"""Time a training step while other processes want the same cores, and while they do not.

    python -m benchmarks.shared_machine [--load 2] [--spins 100 1000 10000]

The tiny detector is fine-tuned on the CPU: once as GNU's OpenMP runtime lets its threads wait by
itself, and with the numbers of turns of its waiting loop that the project sets (or with others).
All run in turns, with processes beside them that compute without end, and without. A ratio compares
two neighbours in time, so that what changes on the machine meanwhile changes both.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.rows import Row, add_rows_argument, write_rows
from benchmarks.workers import Worker, answer
from detection_toolkit.threads import SPINS, SPINS_BESIDE_OTHERS

# Of GNU's runtime, where nothing is set (gomp_spin_count_var in its env.c).
GNU_SPINS = "300000"
PHASES = ("quiet", "loaded")
OVERRIDES = ("train.device=cpu", "train.ema.enabled=false", "dataloader.train.num_workers=0")

# It ends with the process that has started it, however that ends.
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"

# variant -> phase -> seconds of one step, round by round
Seconds = Mapping[str, Mapping[str, Sequence[float]]]


def work(config: str, threads: int) -> None:
    """Train as many steps as each line of the input says, and write the seconds of one."""
    import torch
    from detectron2.utils.events import EventStorage

    from detection_toolkit.config import apply_overrides, get_config
    from detection_toolkit.engine import Trainer, prepare_config
    from detection_toolkit.memory import keep_freed_memory

    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    keep_freed_memory()  # as commands do
    cfg = apply_overrides(get_config(config), OVERRIDES)
    with tempfile.TemporaryDirectory() as folder, EventStorage():
        cfg.train.output_dir = folder
        prepare_config(cfg)
        trainer = Trainer(cfg)
        for line in sys.stdin:
            steps = int(line)
            start = time.perf_counter()
            for _ in range(steps):
                trainer.run_step()
            answer((time.perf_counter() - start) / steps)


@contextlib.contextmanager
def workers(spins: Sequence[str], arguments: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """One for each number of turns."""
    started = {
        count: Worker(
            "benchmarks.shared_machine", ["--work", *arguments], {"GOMP_SPINCOUNT": count}
        )
        for count in spins
    }
    try:
        yield started
    finally:
        for worker in started.values():
            worker.end()


@contextlib.contextmanager
def load(count: int) -> Iterator[list[int]]:
    """Ids of processes that compute without end, one thread each; stopped until they are let go."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        for process in busy:
            process.send_signal(signal.SIGSTOP)
        yield [process.pid for process in busy]
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(
    trainers: Mapping[str, Worker], busy: Sequence[int], *, rounds: int, steps: int
) -> Seconds:
    """All variants in turns, in each phase; every second round in the opposite order."""
    found: dict[str, dict[str, list[float]]] = {
        name: {phase: [] for phase in PHASES} for name in trainers
    }
    for worker in trainers.values():
        worker.measure("2")  # warm up
    for i in range(rounds):
        for phase in PHASES:
            for pid in busy:
                os.kill(pid, signal.SIGCONT if phase == "loaded" else signal.SIGSTOP)
            for name in list(trainers)[:: -1 if i % 2 else 1]:
                found[name][phase] += trainers[name].measure(str(steps))
    return found


def ratio(found: Seconds, count: str, phase: str) -> float:
    """Median over the rounds, to GNU's own way."""
    pairs = zip(found[GNU_SPINS][phase], found[count][phase])
    return statistics.median(first / second for first, second in pairs)


def table(found: Seconds) -> str:
    """Median seconds of each, and of the ratios to GNU's own way, round by round."""
    lines = [f"{'turns':>10}" + "".join(f"{phase + ', s':>12}{'times':>7}" for phase in PHASES)]
    for name, phases in found.items():
        cells = []
        for phase in PHASES:
            seconds = statistics.median(phases[phase])
            cells.append(f"{seconds:12.3f}{ratio(found, name, phase):7.2f}")
        lines.append(f"{name:>10}" + "".join(cells))
    return "\n".join(lines)


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="stageinteractor/shapes_tiny_finetune.py")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each step")
    parser.add_argument("--load", type=int, default=2, help="busy processes (default: %(default)s)")
    turns = [SPINS, SPINS_BESIDE_OTHERS]
    parser.add_argument("--spins", nargs="+", default=turns, help="default: the project's two")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="in a row (default: %(default)s)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    add_rows_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.work:
        return work(args.config, args.threads)
    # Ended from outside, it must not leave the load behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    own = ["--config", args.config, "--threads", str(args.threads)]
    spins = [GNU_SPINS, *(count for count in args.spins if count != GNU_SPINS)]
    with workers(spins, own) as trainers, load(args.load) as busy:
        found = measure(trainers, busy, rounds=args.rounds, steps=args.steps)
    print(f"training step, {args.threads} threads; loaded: {args.load} busy processes")
    print(table(found))
    beside = {"quiet": "", "loaded": f" beside {args.load} busy processes"}
    write_rows(
        args.rows,
        [
            Row(
                f"a small training step{beside[phase]}, {count} turns of waiting",
                f"{GNU_SPINS} turns",
                ratio(found, count, phase),
            )
            for count in spins[1:]
            for phase in PHASES
        ],
    )


if __name__ == "__main__":
    main()
