"""The results of a study: gathered from its cells, kept in a file, shown as tables and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import portalocker

from ..durable import open_log, write_durably, write_text
from ..errors import UserError
from ..texts import parse_json
from ..visualization import plot_convergence
from .plan import Plan
from .run import RECORD, read_record, write_json
from .statistics import summarise
from .tables import insert, render, render_costs, render_for_page

__all__ = ["RESULTS", "STORED", "check_results", "report", "write_results"]

RESULTS, TABLES, PICTURE = "results.json", "tables.md", "convergence.png"
STORED = "ablations"
"""Folder beside a page of the docs, with the results that came with the project."""


def check_results(path: Path, plan: Plan) -> None:
    """A results file must have the plan's base config, and mean the same by its variants.

    Keys that only one of both has do not count: configs gain keys whose default changes nothing.

    Raises:
        ValueError: it does not.
    """
    if not path.is_file():
        return
    try:
        known = parse_json(path.read_bytes())["plan"]
        config, values, variants = (known[key] for key in ("config", "base_config", "variants"))
    except (ValueError, KeyError, TypeError) as error:
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
    with open_log(output / ".lock") as lock:  # other parts write it, too
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
    write_text(output / TABLES, text + "\n")
    curves: dict[str, list] = {}
    for name in results["summary"]["variants"]:
        curves[name] = [cell["curve"] for cell in finished if cell["variant"] == name]
    title = f"{plan.name}, {finished[0]['dataset']}"
    picture = Path(plot_convergence(curves, output / PICTURE, title=title))
    print(f"\n{text}\n\n{output / RESULTS}\n{output / TABLES}\n{picture}")
    if into is not None:
        image = into.parent / "images" / f"ablation_{plan.name}.png"
        insert(into, plan.name, render_for_page(results, f"images/{image.name}"))
        _copy(picture, image)
        stored = into.parent / STORED / f"{plan.name}.json"
        _copy(output / RESULTS, stored)
        print(f"{into}\n{image}\n{stored}")


def _copy(source: Path, target: Path) -> None:
    content = source.read_bytes()
    write_durably(target, lambda file: file.write(content))
