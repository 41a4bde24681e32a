#!/usr/bin/env python3
"""Train variants of a config with several seeds, and compare them.

    python tools/run_ablation.py --plan ablations/shapes_hard.yaml

trains what is not finished yet, one cell (a variant with a seed) after another, and writes to
output/ablations/shapes_hard/ the results (results.json), tables (tables.md) and the convergence
(convergence.png). Started again it goes on where it was stopped. Without a plan file:

    python tools/run_ablation.py --config-file stageinteractor/shapes_hard.py --seeds 1 2 3 \\
        --variant default --variant no_reuse model.decoder.channel_reuse_cap=0

docs/results.md has the plans that were run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from detection_toolkit.defaults import STEPS_OF_COSTS
from detection_toolkit.engine import user_errors
from detection_toolkit.engine.arguments import (
    add_overrides_argument,
    add_trust_argument,
    parse_arguments,
)
from detection_toolkit.engine.parsers import Parser

ROOT = Path(__file__).resolve().parents[1]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def get_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--plan", metavar="YAML", help="config, overrides, variants and seeds")
    option("--config-file", help="base config, in place of a plan")
    option(
        "--variant",
        action="append",
        default=[],
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help="named overrides, in place of a plan; may be repeated, and the first is the baseline",
    )
    option("--seeds", type=int, nargs="+", help="in place of the plan's")
    option("--only", nargs="+", metavar="NAME", help="of the plan's variants")
    option("--output", type=Path, help="default: output/ablations/<name of the plan>")
    option("--part", default="1/1", metavar="I/N", help="every N-th cell, from the I-th on")
    option("--threads", type=_positive, default=1, help="of each run (default: 1)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="only print the cells' commands")
    mode.add_argument("--report", action="store_true", help="train nothing, only compare")
    mode.add_argument(
        "--rerun",
        nargs=2,
        metavar=("NAME", "SEED"),
        help="train a cell anew, elsewhere, and compare its figures to the digit with those of the "
        "finished cell, or where there is none with those that came with the project",
    )
    mode.add_argument(
        "--test",
        action="store_true",
        help="train nothing; evaluate the chosen cells, which must be finished, on the plan's test "
        "split",
    )
    mode.add_argument(
        "--costs",
        action="store_true",
        help="train nothing; measure processor time and memory of a training step of each variant",
    )
    option(
        "--steps", type=_positive, default=STEPS_OF_COSTS, help="of --costs (default: %(default)s)"
    )
    option(
        "--random-images",
        type=_positive,
        nargs=3,
        metavar=("NUMBER", "HEIGHT", "WIDTH"),
        help="of --costs: noise, so many images per step, in place of the config's data",
    )
    option(
        "--into",
        type=Path,
        metavar="PAGE",
        help="also put the tables between the page's marks <!-- begin PLAN --> and "
        "<!-- end PLAN -->, and beside it the picture into images/, the results into ablations/",
    )
    add_trust_argument(parser)
    add_overrides_argument(parser, "changes to the base config, which do not follow a --variant")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line: what follows a ``--variant``, up to the next option, is its own."""
    parser = get_parser()
    variants: list[list[str]] = []
    others: list[str] = []
    own: list[str] = others
    for text in sys.argv[1:] if argv is None else argv:
        name = text.removeprefix("--variant=")
        if text == "--variant" or name != text:
            own = [name] if name != text else []
            variants.append(own)
            continue
        if text.startswith("-"):
            own = others
        own.append(text)
    if not all(variants):
        parser.error("argument --variant: expected a name")
    args = parse_arguments(parser, others)
    args.variant = variants
    return args


def study(args: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code."""
    from detection_toolkit.studies.costs import measure_variants
    from detection_toolkit.studies.environment import facts
    from detection_toolkit.studies.plan import choose_plan
    from detection_toolkit.studies.rerun import rerun, stored_record
    from detection_toolkit.studies.results import (
        RESULTS,
        STORED,
        check_results,
        report,
        write_results,
    )
    from detection_toolkit.studies.run import evaluate_cells, read_cell, run_cells, split

    plan = choose_plan(
        args.plan,
        config=args.config_file,
        variants=args.variant,
        seeds=args.seeds,
        overrides=args.opts,
        trust_config=args.trust_config,
    )
    output = (args.output or ROOT / "output" / "ablations" / plan.name).resolve()
    check_results(output / RESULTS, plan)
    if args.into is not None and not args.into.is_file():
        raise FileNotFoundError(f"page {args.into} does not exist")
    chosen = plan.only(args.only) if args.only else plan
    cells = split(chosen.cells(output), args.part)
    status = 0
    if args.dry_run:
        for cell in cells:
            state = "finished" if read_cell(cell) else "open"
            print(f"{cell.name} ({state})\n$ {cell.command(threads=args.threads)}")
        return 0
    if args.rerun:
        cell = plan.cell(output, *args.rerun)
        path = ROOT / "docs" / STORED / f"{plan.name}.json" if args.plan else None
        return rerun(cell, stored_record(cell, plan, path), threads=args.threads)
    if args.costs:
        measured = measure_variants(
            chosen, threads=args.threads, steps=args.steps, random_images=args.random_images
        )
        write_results(output, plan, {name: {**cost, **facts()} for name, cost in measured.items()})
    elif args.test:
        evaluate_cells(cells, plan, threads=args.threads)
    elif not args.report:
        write_results(output, plan)  # so that others know the variants
        outcome = run_cells(
            cells, threads=args.threads, after_each=lambda: write_results(output, plan)
        )
        print(outcome)
        status = int(bool(outcome.failed))
        if status and not any(read_cell(cell) for cell in plan.cells(output)):
            return status
    report(output, plan, args.into)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse_args(argv)
    with user_errors():
        return study(args)


if __name__ == "__main__":
    # Stopped as by Ctrl-C: the run in progress is ended and writes its checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
