#!/usr/bin/env python3
"""Run the benchmarks of this folder and print one page: a table of ratios, then what each prints.

    make benchmark                     # all, in about ten minutes on two cores
    make benchmark ARGS=--quick        # about a minute: smaller images, fewer rounds, no memory
    make benchmark ARGS="--only attention refiner"

Each ratio compares two forms that ran in turns on this machine. The page is also written to
output/benchmark/report.md. A benchmark that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import Row, read_rows
from detection_toolkit.durable import write_text

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "plain transcription"


class Benchmark(NamedTuple):
    """One command, in full and quick."""

    command: str
    full: str = ""
    quick: str | None = None
    """None: it is not part of the quick page."""


_DECODER = "tools/benchmark.py --device cpu"
_SMALL = "--image-size 320 512 --rounds 1 --no-memory --no-parts --no-curves"
BENCHMARKS = {
    "end_to_end": Benchmark(
        "-m benchmarks.end_to_end",
        "--rounds 1 --pictures 4 --batch-sizes 1 4",
        "--rounds 1 --pictures 2 --batch-sizes 1 --no-step",
    ),
    "decoder": Benchmark(_DECODER, "--no-curves --rounds 3", _SMALL),
    "adamixer": Benchmark(
        f"{_DECODER} --config-file adamixer/adamixer_r50_100q_1x.py",
        "--rounds 3 --no-curves --no-parts",
    ),
    # A step of SQR runs stages on the queries of all earlier stages: five times the work.
    "sqr": Benchmark(
        f"{_DECODER} --config-file sqr/stageinteractor_sqr_r50_100q_1x.py --train-batch 1",
        "--rounds 1 --no-curves --no-parts --no-memory",
    ),
    "attention": Benchmark("-m benchmarks.deformable_attention", "--rounds 3", "--rounds 1"),
    "refiner": Benchmark("-m benchmarks.hybrid_refiner", "--rounds 5"),
    "peer": Benchmark("-m benchmarks.transformers_peer --variants two_stage", "--rounds 2"),
    "metrics": Benchmark(
        "-m benchmarks.coco_backends", "--images 1000 --rounds 1", "--images 200 --rounds 1"
    ),
    "shared": Benchmark("-m benchmarks.shared_machine", "--rounds 5"),
    "start": Benchmark("-m benchmarks.start", "--rounds 2"),
}


class Outcome(NamedTuple):
    """Of one benchmark."""

    command: str
    rows: list[Row]
    printed: str
    seconds: float
    failed: bool


def decoder_rows(results: dict) -> list[Row]:
    """Of the figures that tools/benchmark.py writes."""
    config = Path(results["config"]).stem
    rows = []
    for name, cell in results["cells"].items():
        for form in ("ours", "compiled"):
            if form in cell:
                what = f"{config}: {name}" + ", compiled" * (form == "compiled")
                memory = None
                if "training step" in name and results["memory"]:
                    sizes = results["memory"]
                    memory = sizes[form]["above_interpreter"] / sizes["plain"]["above_interpreter"]
                rows.append(Row(what, PLAIN, cell["plain"] / cell[form], memory))
    return rows


def run(name: str, *, quick: bool) -> Outcome | None:
    """One benchmark in a process of its own; None: it is not part of the quick page."""
    benchmark = BENCHMARKS[name]
    arguments = benchmark.quick if quick else benchmark.full
    if arguments is None:
        return None
    command = f"{benchmark.command} {arguments}".split()
    is_module = command[0] == "-m"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command, "--rows" if is_module else "--json", str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        rows: list[Row] = []
        if done.returncode == 0:
            rows = read_rows(path) if is_module else decoder_rows(json.loads(path.read_text()))
    failed = done.returncode != 0
    printed = done.stdout + (done.stderr[-2000:] if failed else "")
    return Outcome(f"python {' '.join(command)}", rows, printed.strip(), seconds, failed)


def page(found: dict[str, Outcome]) -> str:
    """As Markdown: ratios first."""
    import torch

    from detection_toolkit.studies.environment import processor, today

    lines = [
        f"{today()}, {processor()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "",
        "| what | against | times as fast | of the memory | benchmark |",
        "|---|---|---|---|---|",
    ]
    for name, outcome in found.items():
        for row in outcome.rows:
            memory = "" if row.memory is None else f"{row.memory:.2f}"
            lines.append(f"| {row.what} | {row.against} | {row.ratio:.2f} | {memory} | {name} |")
        if outcome.failed:
            lines.append(f"| {name} | failed, see below | | | {name} |")
    for name, outcome in found.items():
        lines += ["", f"## {name}: {outcome.seconds:.0f} s", "", f"`{outcome.command}`", ""]
        lines += ["```", outcome.printed, "```"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a benchmark has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="in a minute")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "benchmark" / "report.md")
    args = parser.parse_args(argv)
    found: dict[str, Outcome] = {}
    for name in args.only:
        print(f"{name} ...", end="", file=sys.stderr, flush=True)
        outcome = run(name, quick=args.quick)
        if outcome is None:
            print(" not in the quick page", file=sys.stderr)
            continue
        print(f" {outcome.seconds:.0f} s", file=sys.stderr)
        found[name] = outcome
        write_text(args.output, page(found))
    print(page(found), end="")
    return int(any(outcome.failed for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
