#!/usr/bin/env python3
"""Time how long a command takes to print its help, and to finish its first training step.

    python -m benchmarks.start [--rounds 5]

Beside them stands what a process needs to import PyTorch, and PyTorch with Detectron2's engine,
which no training can do without. Seconds of the processor, user and system, medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row, add_rows_argument, write_rows

ROOT = Path(__file__).resolve().parents[1]
TORCH, ENGINE = "import torch", "import torch, detectron2.engine"
HELP, STEP = "train_net.py --help", "train_net.py up to the first step"
SPEEDUPS = ((HELP, TORCH), (STEP, ENGINE))


def commands(folder: str) -> dict[str, list[str]]:
    """What is timed, by name."""
    config = ["--config-file", "stageinteractor/shapes_tiny.py"]
    run = [f"train.output_dir={folder}", "train.device=cpu", "train.log_period=1"]
    return {
        TORCH: ["-c", TORCH],
        ENGINE: ["-c", ENGINE],
        HELP: ["train_net.py", "--help"],
        STEP: ["train_net.py", *config, *run, "dataloader.train.num_workers=0"],
    }


def processor_seconds(arguments: Sequence[str]) -> float:
    """Of a Python process with these arguments, up to its first line of losses or its end."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            if "total_loss" in line:
                seconds = _used(process.pid)
                process.kill()
                return seconds
        # Not collected yet, so that its times can still be read.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = _used(process.pid)
    if process.returncode:
        raise OSError(f"python {' '.join(arguments)} ended with exit code {process.returncode}")
    return seconds


def _used(pid: int) -> float:
    """User and system seconds of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    add_rows_argument(parser)
    args = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {}
    for i in range(1 + args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, arguments in commands(folder).items():
                found = processor_seconds(arguments)
                if i:  # the first fills the cache of files
                    seconds.setdefault(name, []).append(found)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:36}{value:7.2f} s")
    rows = [Row(what, against, medians[against] / medians[what]) for what, against in SPEEDUPS]
    write_rows(args.rows, rows)


if __name__ == "__main__":
    main()
