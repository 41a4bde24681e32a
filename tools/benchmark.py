#!/usr/bin/env python
"""Time the detector against a plain transcription of the method, in one process.

    python tools/benchmark.py [--config-file …] [--device cuda] [--dtype bfloat16] [key=value …]

Prints ratios to the plain form (benchmarks/plain.py) and to a forward pass of torchvision's
ResNet-50 on the same image, the peak memory of a training step, how cost grows with queries and
stages, and for each part how near it comes to what the machine's own rates of matrix products and
copies allow. The two forms take turns; seconds are medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detection_toolkit.durable import write_text
from detection_toolkit.engine import user_errors
from detection_toolkit.engine.arguments import (
    add_overrides_argument,
    add_trust_argument,
    parse_arguments,
)
from detection_toolkit.engine.parsers import Parser

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parents[1]
# Of the authors' decoder with so many queries: inference, times ResNet-50 (two CPU threads).
PUBLISHED = {100: 0.46, 300: 1.35}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="stageinteractor/stageinteractor_r50_100q_1x.py")
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--batch", type=int, default=1, help="images at inference (default: 1)")
    parser.add_argument("--train-batch", type=int, default=2, help="images per step (default: 2)")
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is a GPU)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument(
        "--compile",
        metavar="MODE",
        default="",
        help="also time the compiled decoder: default, reduce-overhead, … (minutes on a CPU)",
    )
    parser.add_argument("--no-curves", action="store_true", help="leave out queries and stages")
    parser.add_argument("--no-parts", action="store_true", help="leave out the detector's parts")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    add_trust_argument(parser)
    add_overrides_argument(parser, "changes of the config")
    args = parse_arguments(parser, argv)
    for name in ("batch", "train_batch", "threads", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.image_size) < 32:
        parser.error("--image-size: both sides need at least 32 pixels")
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return args


def plain_form() -> Callable[[nn.Module], nn.Module]:
    """``to_plain`` of benchmarks/plain.py, which is no installed package."""
    spec = importlib.util.spec_from_file_location("plain", ROOT / "benchmarks" / "plain.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    return plain.to_plain


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv)
    import torch

    from detection_toolkit.config import apply_overrides, get_config
    from detection_toolkit.studies.benchmark import Bench, Conditions, memory_of, run

    with user_errors():
        cfg = apply_overrides(
            get_config(args.config_file, trust_config=args.trust_config), args.opts
        )
        torch.set_num_threads(args.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        conditions = Conditions(
            image_size=tuple(args.image_size),
            batch=args.batch,
            train_batch=args.train_batch,
            device=torch.device(args.device),
            dtype=getattr(torch, args.dtype),
            rounds=args.rounds,
            compile=args.compile,
        )
        bench = Bench(cfg, conditions, plain_form())
        if args.memory_of:
            print(json.dumps(memory_of(bench, args.memory_of)))
            return 0
        results = run(
            bench,
            command=" ".join(["python tools/benchmark.py", *argv]),
            memory_command=None
            if args.no_memory
            else [sys.executable, __file__, *argv, "--memory-of"],
            published=PUBLISHED.get(int(cfg.model.initial_queries.num_queries)),
            with_curves=not args.no_curves,
            with_parts=not args.no_parts,
        )
        results["config"] = args.config_file
        if args.json:
            write_text(args.json, json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
