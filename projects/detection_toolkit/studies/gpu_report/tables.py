"""The report as Markdown, and as a short table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["markdown", "short_table"]

_MARKS = {True: "ok", False: "**no**", None: ""}


def markdown(facts: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str:
    """All rows of all stages."""
    lines = ["# Report of a device", ""]
    lines += [f"- {name}: {_text(value)}" for name, value in facts.items()]
    lines += ["", *_summary(stages)]
    for stage in stages:
        lines += ["", f"## {stage['name']}", "", _state(stage), ""]
        if stage["rows"]:
            lines += ["| | figures | | |", "|---|---|---|---|"]
        for row in stage["rows"]:
            figures = ", ".join(f"{k} {_text(v)}" for k, v in row["values"].items())
            cells = (row["name"], figures, _MARKS[row["ok"]], row["note"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def short_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """One line per stage, and the checks that have failed."""
    lines = _summary(stages)
    for stage in stages:
        failed = [row for row in stage["rows"] if row["ok"] is False]
        lines += [f"{stage['name']}: {row['name']} failed {row['note']}".rstrip() for row in failed]
        if stage["reason"]:
            lines.append(f"{stage['name']}: {stage['reason']}")
    return "\n".join(lines)


def _summary(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| stage | | checks | rows | s |", "|---|---|---|---|---|"]
    for stage in stages:
        checked = [row for row in stage["rows"] if row["ok"] is not None]
        good = sum(row["ok"] for row in checked)
        lines.append(
            f"| {stage['name']} | {stage['status']} | {good} of {len(checked)} hold | "
            f"{len(stage['rows'])} | {stage['seconds']:.0f} |"
        )
    return lines


def _state(stage: Mapping[str, Any]) -> str:
    text = f"{stage['status']} after {stage['seconds']:.0f} s of {stage['limit']:.0f} s"
    return f"{text}: {stage['reason']}" if stage["reason"] else text


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
