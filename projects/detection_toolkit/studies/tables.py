"""Tables in Markdown, and their place in a page of the docs."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..durable import write_text
from ..errors import UserError
from ..texts import in_markdown

__all__ = ["insert", "render", "render_costs", "render_for_page"]

NOTHING = "–"
# Column -> measure, digits, factor.
COLUMNS: Mapping[str, tuple[str, int, float]] = {
    "AP": ("AP", 2, 1),
    "AP50": ("AP50", 2, 1),
    "AP75": ("AP75", 2, 1),
    "APs": ("APs", 2, 1),
    "APm": ("APm", 2, 1),
}
BETWEEN_STAGES: Mapping[str, tuple[str, int, float]] = {
    "AP after NMS": ("AP_after_NMS", 2, 1),
    "duplicates %": ("duplicates", 1, 100),
    "faded %": ("faded", 1, 100),
    "grown %": ("grown", 1, 100),
    "labels changed %, own match": ("label_changes_own_match", 1, 100),
    "labels changed %, cross-stage": ("label_changes_cross_stage", 1, 100),
}
COST: Mapping[str, tuple[str, int, float]] = {
    "seconds per step (wall clock)": ("seconds_per_step", 3, 1),
    "processor minutes": ("cpu_minutes", 2, 1),
    "minutes": ("minutes", 2, 1),
    "peak memory of the process, MB": ("peak_memory_mb", 0, 1),
}
MOST_CLASSES = 12  # with a column each


def render(results: Mapping[str, Any]) -> str:
    """All tables of a results file, with commands, seeds, versions and machines."""
    (_, main), *others = _sections(results)
    return "\n\n".join([main, *(f"{title}:\n\n{body}" for title, body in others)])


def render_for_page(results: Mapping[str, Any], picture: str) -> str:
    """The same for a page of the docs: chart and main table, and everything else folded.

    Args:
        results: see :func:`render`.
        picture: address of the chart, relative to the page.
    """
    (_, main), *others = _sections(results)
    # GitHub folds by HTML alone; Python-Markdown reads what is in it where "markdown" says so.
    folded = (
        f'<details markdown="1">\n<summary>{_html(title)}</summary>\n\n{body}\n\n</details>'
        for title, body in others
    )
    return "\n\n".join([f"![AP over the iterations]({picture})", main, *folded])


def render_costs(results: Mapping[str, Any]) -> str:
    """What a training step of each variant costs."""
    return "\n\n".join(f"{title}:\n\n{body}" for title, body in _costs(results["costs"]))


def _sections(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and text of each part that is not empty; first the main table."""
    variants = results["summary"]["variants"]
    finished = [cell for cell in results["cells"] if _is_finished(cell)]
    parts = [
        ("AP", _measures(variants, COLUMNS, with_seeds=True)),
        ("AP of each seed", _seeds(finished, list(variants))),
        (
            "Differences of AP, seed by seed, with the interval of 95 % of bootstrap means",
            _differences(results["summary"]["differences_of_AP"]),
        ),
        ("AP of each class", _classes(variants)),
        *_test_split(results),
        ("AP after each stage", _stages(variants)),
        ("Between the stages", _measures(variants, BETWEEN_STAGES)),
        (
            "Time and memory of the runs (without the times of interrupted ones)",
            _measures(variants, COST),
        ),
        *_costs(results.get("costs", {})),
        ("Machine, versions, command", _provenance(results)),
    ]
    return [parts[0], *(part for part in parts[1:] if part[1])]


def _html(title: str) -> str:
    """A title of Markdown with code in it."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(title, quote=False))


def _test_split(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    summary = results["summary"]
    tested = [c for c in results["cells"] if _is_finished(c) and "test" in c]
    if not tested:
        return []
    names = {cell["test"]["dataset"] for cell in tested}
    if names & {cell["dataset"] for cell in tested}:
        overrides = "`, `".join(results["plan"].get("test", ()))
        title = f"The same weights, evaluated with `{overrides}` (`--test`)"
    else:
        title = f"AP on `{'`, `'.join(sorted(names))}`, evaluated once per cell after its training"
    tables = [
        _measures(summary["variants"], {"AP": ("test_AP", 2, 1), "AP50": ("test_AP50", 2, 1)}),
        _differences(summary["differences_of_test_AP"]),
    ]
    return [(title, "\n\n".join(filter(None, tables)))]


def insert(page: Path, name: str, text: str) -> None:
    """Put a text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of a page.

    Raises:
        FileNotFoundError: there is no such page.
        ValueError: it lacks the two marks.
    """
    content = page.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = content.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise UserError(f"{page} has no lines {begin!r} and {end!r} to put the tables between")
    write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _measures(
    variants: Mapping[str, Any],
    columns: Mapping[str, tuple[str, int, float]],
    *,
    with_seeds: bool = False,
) -> str:
    used = {
        title: column
        for title, column in columns.items()
        if any(v[column[0]]["mean"] is not None for v in variants.values())
    }
    rows = [
        [
            name,
            *([len(variant["seeds"])] if with_seeds else []),
            *(_number(variant[m], digits, factor) for m, digits, factor in used.values()),
        ]
        for name, variant in variants.items()
    ]
    return _table(rows, ["", *(["seeds"] if with_seeds else []), *used]) if used else ""


def _seeds(finished: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> str:
    ap = {(cell["variant"], cell["seed"]): cell["metrics"]["AP"] for cell in finished}
    seeds = sorted({seed for _, seed in ap})
    # With all digits that a rerun must meet.
    rows = [[v, *(_plain(ap.get((v, seed)), 4) for seed in seeds)] for v in variants]
    return _table(rows, ["", *(f"seed {seed}" for seed in seeds)])


def _differences(differences: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for d in differences:
        interval = d["interval"]
        rows.append(
            [
                f"{d['to']} − {d['from']}",
                _plain(d["mean"], 2, sign=True),
                "" if interval is None else " … ".join(_plain(x, 2, sign=True) for x in interval),
                ", ".join(_plain(x, 2, sign=True) for x in d["values"]),
            ]
        )
    return _table(rows, ["", "mean", "interval", "each seed"]) if rows else ""


def _classes(variants: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for v in variants.values() for name in v["AP_by_class"]))
    if not 1 < len(names) <= MOST_CLASSES:
        return ""
    nothing = {"mean": None, "std": None}
    rows = [
        [name, *(_number(variant["AP_by_class"].get(c, nothing), 2, 1) for c in names)]
        for name, variant in variants.items()
    ]
    return _table(rows, ["", *map(in_markdown, names)])


def _costs(costs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a training step, beside each figure a multiple of the first variant's."""
    if not costs:
        return []
    name, first = next(iter(costs.items()))

    def times(cost: Mapping[str, Any], key: str) -> str:
        conditions = ("device", "threads", "machine", "random_images")
        if not first[key] or any(cost.get(x) != first.get(x) for x in conditions):
            return NOTHING
        return f"{cost[key] / first[key]:.2f}"

    rows = [
        [
            name,
            f"{cost['seconds']:.3f}",
            times(cost, "seconds"),
            f"{cost['memory_mb']:.0f}",
            times(cost, "memory_mb"),
        ]
        for name, cost in costs.items()
    ]
    on_gpu = first["device"].startswith("cuda")
    code = "; ".join(sorted({f"commit {c['commit']}, {c['date']}" for c in costs.values()}))
    where = f"{first['device']}, threads: {first['threads']}; {code}"
    if first.get("random_images"):
        where = "{} random images of {} x {}, ".format(*first["random_images"]) + where
    note = (
        f"{'Wall-clock' if on_gpu else 'Processor'} seconds (median of {first['steps']} steps) and "
        f"the most memory that PyTorch allocates in a step, also as multiples of those of `{name}` "
        f"({where})."
    )
    table = _table(rows, ["", "seconds", f"× {name}", "MB", f"× {name}"])
    return [("Costs of a training step, measured separately (`--costs`)", f"{note}\n\n{table}")]


def _stages(variants: Mapping[str, Any]) -> str:
    rows = [
        [name, *(_number(stage, 2, 1) for stage in variant["AP_by_stage"])]
        for name, variant in variants.items()
    ]
    most = max(len(row) for row in rows) - 1
    return _table(rows, ["", *(f"stage {t + 1}" for t in range(most))]) if most else ""


def _provenance(results: Mapping[str, Any]) -> str:
    finished = [cell for cell in results["cells"] if _is_finished(cell)]
    others = [cell for cell in results["cells"] if not _is_finished(cell)]
    lines = []
    if finished:
        first = finished[0]
        for title, values in [
            ("machine", {_machine(cell["machine"]) for cell in finished}),
            ("threads per cell", {str(cell["threads"]) for cell in finished}),
            ("versions", {_versions(cell["versions"]) for cell in finished}),
            ("commit", {str(cell["commit"]) for cell in finished}),
            ("date", {cell["date"] for cell in finished}),
            ("weights evaluated", {cell["weights"] for cell in finished}),
        ]:
            lines.append(f"- {title}: {'; '.join(sorted(values))}")
        lines += ["- command of the first cell:", "", f"      {first['command']}"]
    resumed = [cell for cell in finished if cell["starts"] > 1]
    if resumed:
        names = ", ".join(f"{cell['variant']} seed {cell['seed']}" for cell in resumed)
        lines.append(f"- interrupted and resumed: {names}")
    for cell in others:
        lines.append(
            f"- **not finished**: {cell['variant']} seed {cell['seed']} ({cell['status']}"
            + (f": {cell['error']})" if "error" in cell else ")")
        )
    return "\n".join(lines)


def _is_finished(cell: Mapping[str, Any]) -> bool:
    return cell["status"] == "finished"


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['gpu'] or machine['cpu']}, {machine['cpu_cores']} cores"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _number(spread: Mapping[str, Any], digits: int, factor: float) -> str:
    if spread["mean"] is None:
        return NOTHING
    text = f"{spread['mean'] * factor:.{digits}f}"
    return text if spread["std"] is None else f"{text} ± {spread['std'] * factor:.{digits}f}"


def _plain(value: float | None, digits: int, *, sign: bool = False) -> str:
    if value is None:
        return NOTHING
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, "pipe", colalign=align, disable_numparse=True)
