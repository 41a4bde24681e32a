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
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import portalocker
from ablation.costs import measure_variants
from ablation.plan import ROOT, Cell, Plan, load_plan
from ablation.report import insert, render, render_costs
from ablation.run import (
    RECORD,
    Outcome,
    check_same_cell,
    evaluate_cell,
    read_cell,
    read_record,
    run_cells,
    split,
    train_cell,
    write_json,
)
from ablation.statistics import summarise
from make_shapes_checkpoint import commit, machine, versions
from tqdm import tqdm

from detection_toolkit.engine import user_errors
from detection_toolkit.engine.arguments import add_overrides_argument
from detection_toolkit.errors import UnknownNameError, UserError
from detection_toolkit.visualization import plot_convergence

RESULTS, TABLES, PICTURE = "results.json", "tables.md", "convergence.png"
STORED = "ablations"  # beside the page, with the results that came with the project


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", metavar="YAML", help="config, overrides, variants and seeds")
    parser.add_argument("--config-file", help="base config, in place of a plan")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help="named overrides, in place of a plan; may be repeated, and the first is the baseline",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the plan's")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the plan's variants")
    parser.add_argument("--output", type=Path, help="default: output/ablations/<name of the plan>")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="train every N-th cell, from the I-th on"
    )
    parser.add_argument(
        "--threads", type=_positive, default=1, help="of each training (default: 1)"
    )
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
    parser.add_argument(
        "--into",
        type=Path,
        metavar="PAGE",
        help="also put the tables between the page's marks <!-- begin PLAN --> and "
        "<!-- end PLAN -->, and beside it the picture into images/, the results into ablations/",
    )
    add_overrides_argument(parser, "further changes to the base config")
    return parser


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan of the command line.

    Raises:
        FileNotFoundError, KeyError, ValueError: see :class:`Plan`.
    """
    if args.plan and (args.config_file or args.variant):
        raise UserError("--plan already has a config and variants: leave the other options out")
    if args.plan:
        plan = load_plan(args.plan)
    elif args.config_file:
        names = [name for name, *_ in args.variant]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"the variant {twice[0]!r} is given twice")
        plan = Plan(
            config=args.config_file,
            variants={name: tuple(overrides) for name, *overrides in args.variant},
            seeds=tuple(args.seeds or ()),
            name=Path(args.config_file).stem,
        )
    else:
        raise UserError("give --plan, for example ablations/shapes_hard.yaml, or --config-file")
    changes: dict[str, Any] = {"overrides": (*plan.overrides, *args.opts)}
    if args.seeds:
        changes["seeds"] = tuple(args.seeds)
    plan = replace(plan, **changes)
    plan.check()
    return plan


def check_results(path: Path, plan: Plan) -> None:
    """A results file must have the plan's base config, and mean the same by its variants.

    Keys that only one of both has do not count: configs gain keys whose default changes nothing.

    Raises:
        ValueError: it does not.
    """
    if not path.is_file():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["plan"]
        config, values, variants = (known[key] for key in ("config", "base_config", "variants"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no results file ({error!r}): remove it") from error
    ours = plan.as_dict()
    different = [
        f"{key} is {values[key]!r} there and {value!r} here"
        for key, value in ours["base_config"].items()
        if values.get(key, value) != value
    ]
    if config != plan.config:
        different.insert(0, f"its config is {config}, not {plan.config}")
    if different:
        more = f" ({len(different)} differences)" if len(different) > 3 else ""
        raise UserError(
            f"{path} has results of another base config: {'; '.join(different[:3])}{more}. "
            "Choose another --output"
        )
    for name, overrides in ours["variants"].items():
        if variants.get(name, overrides) != overrides:
            raise UserError(
                f"in {path} the variant {name!r} has the overrides {variants[name]}, "
                f"not {overrides}: choose another --output, or another name"
            )


def write_results(
    output: Path, plan: Plan, costs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Gather all cells under the folder, also those of other parts and former plans.

    Args:
        costs: of a training step, by variant; kept beside those that are known.

    Raises:
        ValueError: a record is damaged.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "a") as lock:  # other parts write it, too
        portalocker.lock(lock, portalocker.LOCK_EX)
        results = _gather(output, plan, costs or {})
        write_json(output / RESULTS, results)
    return results


def _gather(output: Path, plan: Plan, costs: Mapping[str, Any]) -> dict[str, Any]:
    path = output / RESULTS
    former = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cells = {(c["variant"], c["seed"]): c for c in former.get("cells", ())}
    described = plan.as_dict()
    for key, value in former.get("plan", {}).get("variants", {}).items():
        described["variants"].setdefault(key, value)
    for file in output.glob(f"*/seed_*/{RECORD}"):
        record = read_record(file)
        if record is None:
            continue  # removed meanwhile
        if record["variant"] not in described["variants"]:
            # A former plan's, or one that another call has added to the plan meanwhile.
            print(f"left out: {file}, as neither the plan nor {path} has such a variant")
            continue
        cells[record["variant"], record["seed"]] = record
    described["seeds"] = sorted({*described["seeds"], *(seed for _, seed in cells)})
    order = list(described["variants"])
    records = sorted(cells.values(), key=lambda c: (order.index(c["variant"]), c["seed"]))
    finished = [record for record in records if record["status"] == "finished"]
    used = [name for name in order if any(r["variant"] == name for r in finished)]
    known = {**former.get("costs", {}), **costs}
    return {
        "plan": described,
        "cells": records,
        "summary": summarise(finished, used),
        "costs": {name: known[name] for name in order if name in known},
    }


def report(output: Path, plan: Plan, into: Path | None = None) -> None:
    """Write tables and picture of what is finished so far; print the costs where nothing is.

    Raises:
        ValueError: there are neither, or the page has no place for the tables.
    """
    results = write_results(output, plan)
    finished = [cell for cell in results["cells"] if cell["status"] == "finished"]
    if not finished and results["costs"] and into is None:
        print(f"\n{render_costs(results)}\n\n{output / RESULTS}")
        return
    if not finished:
        raise UserError(f"no cell under {output} is finished: there is nothing to compare")
    text = render(results)
    (output / TABLES).write_text(text + "\n", encoding="utf-8")
    curves: dict[str, list] = {}
    for name in results["summary"]["variants"]:
        curves[name] = [cell["curve"] for cell in finished if cell["variant"] == name]
    title = f"{plan.name}, {finished[0]['dataset']}"
    picture = Path(plot_convergence(curves, output / PICTURE, title=title))
    print(f"\n{text}\n\n{output / RESULTS}\n{output / TABLES}\n{picture}")
    if into is not None:
        image = into.parent / "images" / f"ablation_{plan.name}.png"
        insert(into, plan.name, f"{text}\n\n![Convergence](images/{image.name})")
        image.parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, image)
        stored = into.parent / STORED / f"{plan.name}.json"
        stored.parent.mkdir(exist_ok=True)
        shutil.copyfile(output / RESULTS, stored)
        print(f"{into}\n{image}\n{stored}")


def stored_record(cell: Cell, plan: Plan, path: Path | None) -> dict[str, Any]:
    """The record of a cell that is finished, here or in the results that came with the project.

    Args:
        path: of the latter.

    Raises:
        ValueError: it is not finished, or one of another config.
    """
    record = read_cell(cell)
    if record is not None:
        return record
    if path is None or not path.is_file():
        raise UserError(f"{cell.name} is not finished under {cell.folder}: train it first")
    check_results(path, plan)
    for record in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if (record["variant"], record["seed"]) == (cell.variant, cell.seed):
            check_same_cell(cell, record, place=path)
            if record["status"] == "finished":
                return record
    raise UserError(
        f"{cell.name} is not finished under {cell.folder}, and {path} has no figures of it: train "
        "it first"
    )


def rerun(cell: Cell, record: Mapping[str, Any], *, threads: int) -> int:
    """Train a finished cell anew in a folder of its own; 0 if all figures are the same."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rerun-", dir=cell.folder) as folder:
        again = replace(cell, folder=Path(folder))
        print(f"$ {again.command(threads=threads)}", flush=True)
        with tqdm(total=cell.max_iter, desc=cell.name, unit=" steps", smoothing=0) as bar:
            new = train_cell(
                again,
                threads=threads,
                facts=facts,
                progress=lambda steps: bar.update(steps - bar.n),
            )
        if new["status"] != "finished":
            log = cell.folder / "rerun_output.txt"
            shutil.copyfile(Path(folder) / "output.txt", log)
            print(f"{cell.name}: FAILED, {new['error']}; see {log}")
            return 1
    keys = ("metrics", "curve", "stage_metrics")
    different = [key for key in keys if not _repeats(new[key], record[key])]
    for key in different:
        print(f"{cell.name}: other {key}: {new[key]}, stored {record[key]}")
    if not different:
        print(f"{cell.name}: AP {new['metrics']['AP']!r}, the stored figures to the digit")
    return int(bool(different))


def _repeats(new: Any, stored: Any) -> bool:
    """Whether every stored figure is found again; there may be new ones beside."""
    if isinstance(stored, dict) and isinstance(new, dict):
        return all(key in new and _repeats(new[key], stored[key]) for key in stored)
    if isinstance(stored, list) and isinstance(new, list):
        return len(new) == len(stored) and all(map(_repeats, new, stored))
    return bool(new == stored)


def test_cells(cells: Sequence[Cell], plan: Plan, *, threads: int) -> None:
    """Evaluate the finished cells on the test split; those that have been already are left alone.

    Raises:
        ValueError: the plan has no test split, a cell is not finished, or an evaluation fails.
    """
    if not plan.test:
        raise UserError("the plan has no test split: give it overrides under the key test")
    records = {cell.name: read_cell(cell) for cell in cells}
    unfinished = [name for name, record in records.items() if record is None]
    if unfinished:
        raise UserError(
            f"{len(unfinished)} cells are not finished ({unfinished[0]}): the test split is looked "
            "at when all are"
        )
    for cell in tqdm(cells, "test split", unit=" cells"):
        known = records[cell.name].get("test")
        if known is None or known.get("overrides", list(plan.test)) != list(plan.test):
            evaluate_cell(cell, plan.test, threads=threads)


def facts() -> dict[str, Any]:
    """About machine, versions and date."""
    return {
        "machine": {k: v for k, v in machine().items() if k != "torch_threads"},
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def say(outcome: Outcome) -> int:
    """What became of the cells, and the exit code."""
    print(
        f"{outcome.finished} cells trained, {outcome.found_finished} were finished already, "
        f"{len(outcome.failed)} failed, {len(outcome.skipped)} are being trained elsewhere"
    )
    for name in outcome.failed:
        print(f"FAILED: {name}")
    return int(bool(outcome.failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = get_parser().parse_args(argv)
    with user_errors():
        plan = make_plan(args)
        output = (args.output or ROOT / "output" / "ablations" / plan.name).resolve()
        check_results(output / RESULTS, plan)
        if args.into is not None and not args.into.is_file():
            raise FileNotFoundError(f"page {args.into} does not exist")
        chosen = plan.only(args.only) if args.only else plan
        cells = split(chosen.cells(output), args.part)
        if args.dry_run:
            for cell in cells:
                state = "finished" if read_cell(cell) else "open"
                print(f"{cell.name} ({state})\n$ {cell.command(threads=args.threads)}")
            return 0
        if args.rerun:
            name, seed = args.rerun
            found = [c for c in plan.cells(output) if c.variant == name and str(c.seed) == seed]
            if not found:
                raise UnknownNameError(f"the plan has no cell {name!r} with seed {seed}")
            path = ROOT / "docs" / STORED / f"{plan.name}.json" if args.plan else None
            record = stored_record(found[0], plan, path)
            return rerun(found[0], record, threads=args.threads)
        status = 0
        if args.costs:
            measured = measure_variants(chosen, threads=args.threads)
            write_results(
                output, plan, {name: {**cost, **facts()} for name, cost in measured.items()}
            )
        elif args.test:
            test_cells(cells, plan, threads=args.threads)
        elif not args.report:
            write_results(output, plan)  # so that others know the variants
            outcome = run_cells(
                cells,
                threads=args.threads,
                facts=facts,
                after_each=lambda: write_results(output, plan),
            )
            status = say(outcome)
            if status and not any(read_cell(cell) for cell in plan.cells(output)):
                return status
        report(output, plan, args.into)
        return status


if __name__ == "__main__":
    # Stopped as by Ctrl-C: the training that runs is ended and writes its checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
