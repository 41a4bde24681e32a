#!/usr/bin/env python3
"""Check and measure the project on a GPU: one command, a few minutes, one report.

    python3 tools/gpu_report.py [--only STAGE ...] [--minutes 8] [--wheels DIR]

Stages: correct (numeric cases, forms against each other), fast (times, memory, ratios), trains
(from scratch, the full-size loop), repeats (equal runs, equal weights), exports (ONNX Runtime).
After each the report is written: report.md and report.json in the output folder. Exit status: 0 if
every stage came to its end and every check holds, else 1.

--wheels is for a machine that has PyTorch but neither Detectron2 nor a network: the wheels of that
folder are unpacked into the output folder. --device cpu --small tries the command itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("correct", "fast", "trains", "repeats", "exports")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="STAGE")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--small", action="store_true", help="at toy size")
    parser.add_argument("--plan", type=Path, help="default: configs/gpu/full.yaml, or small.yaml")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="unpack and use these")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu", metavar="FOLDER")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, not {args.minutes}")
    args.plan = args.plan or ROOT / "configs" / "gpu" / (
        "small.yaml" if args.small else "full.yaml"
    )
    return args


def use_wheels(wheels: Path, folder: Path) -> None:
    """Unpack wheels, and let this process and those that it starts import what is in them."""
    from unpack_wheels import unpack

    try:
        for reason in unpack(wheels, folder):
            print(f"left out: {reason}", file=sys.stderr)
    except OSError as error:
        sys.exit(f"error: {error}")
    paths = [str(folder), str(ROOT / "projects")]
    sys.path[:0] = paths
    rest = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([rest] if rest else [])])


def load_plain():
    """``to_plain`` of benchmarks/plain.py, which is no installed package."""
    spec = importlib.util.spec_from_file_location("plain", ROOT / "benchmarks" / "plain.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    return plain.to_plain


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv)
    output = args.output.resolve()
    if args.wheels:
        use_wheels(args.wheels, output / "site")
    try:
        from detection_toolkit.engine import user_errors

        if args.device.startswith("cuda"):
            import torch

            if not torch.cuda.is_available():
                sys.exit(
                    "error: PyTorch finds no GPU here (--device cpu --small tries the command)"
                )
        from detection_toolkit.studies.environment import facts
        from detection_toolkit.studies.gpu_report import GpuPlan, short_table, supervise, work
    except ImportError as error:
        sys.exit(f"error: {error} (--wheels DIR takes what the machine lacks from a folder)")

    with user_errors():
        plan = GpuPlan.read(args.plan)
        if args.work:
            return work(
                plan,
                args.only,
                seconds=60 * args.minutes,
                device=args.device,
                folder=output / "runs",
                events=args.work,
                to_plain=load_plain(),
            )
        # cuBLAS reads it when it starts; deterministic sums need it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        shared = ["--device", args.device, "--plan", str(args.plan), "--output", str(output)]

        def command(stages: Sequence[str], seconds: float, events: Path) -> list[str]:
            script = [sys.executable, __file__, *shared, "--minutes", str(seconds / 60)]
            return [*script, "--work", str(events), "--only", *stages]

        reports = supervise(
            command,
            [name for name in NAMES if name in args.only],
            seconds=60 * args.minutes,
            output=output,
            facts={**facts(), "command": " ".join(["python3 tools/gpu_report.py", *argv])},
        )
    print(short_table([report.as_dict() for report in reports]))
    print(f"report: {output / 'report.md'}")
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
