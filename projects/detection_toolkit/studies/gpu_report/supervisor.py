"""Runs the stages in a process of their own, ends what takes too long, writes the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...durable import open_log, write_text
from .stages import seconds_of
from .tables import markdown

__all__ = ["StageReport", "supervise"]

POLL = 0.1
GRACE = 5.0  # seconds that a process has to end by itself


@dataclass
class StageReport:
    """What is known of a stage."""

    name: str
    limit: float
    """Seconds that it has."""
    status: str = "not begun"
    """Then "running", and at last "done", "failed", "ended by its time limit", "crashed" or
    "interrupted"."""
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether it has come to its end and no check has failed."""
        return self.status == "done" and all(row["ok"] is not False for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "passed": self.passed}


class _Ended(Exception):
    """A signal asks this process to end."""


def supervise(
    command: Callable[[Sequence[str], float, Path], Sequence[str]],
    names: Sequence[str],
    *,
    seconds: float,
    output: Path,
    facts: Mapping[str, Any],
) -> list[StageReport]:
    """Run the stages, writing ``report.json`` and ``report.md`` after each.

    Time that a stage leaves over is shared among the later ones.

    Args:
        command: the command line of a process that runs the given stages in the given seconds, and
            tells of them in the given file; see :func:`~.worker.work`.
        names: of the stages, in their order.
        seconds: that all may take together.
        output: folder for the reports.
        facts: about machine and versions; the head of the report.

    Returns:
        what became of each. After a signal to end, those that had not ended are marked so.
    """
    output.mkdir(parents=True, exist_ok=True)
    events = output / "events.jsonl"
    events.unlink(missing_ok=True)
    reports = [StageReport(name, 0.0) for name in names]
    end = time.monotonic() + seconds

    def write() -> None:
        _write(output, facts, reports)

    with _signals_raise():
        try:
            waiting = list(reports)
            while waiting:
                waiting = _run(command, waiting, end, events, write)
        except (_Ended, KeyboardInterrupt):
            for report in reports:
                if report.status in ("running", "not begun"):
                    report.status = "interrupted"
        finally:
            write()
    return reports


def _run(
    command: Callable[[Sequence[str], float, Path], Sequence[str]],
    waiting: list[StageReport],
    end: float,
    events: Path,
    write: Callable[[], None],
) -> list[StageReport]:
    """One process, until it ends or has to be ended; returns the stages that are left."""
    log = events.with_name("log.txt")
    seen = len(_lines(events))
    names = [report.name for report in waiting]
    with open_log(log) as file:
        process = subprocess.Popen(
            command(names, max(0.0, end - time.monotonic()), events),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    waiting = list(waiting)
    try:
        while waiting:
            current = waiting[0]
            start = time.monotonic()
            current.limit = seconds_of(current.name, [r.name for r in waiting], end - start)
            seen, has_ended = _watch(process, current, events, seen)
            current.seconds = time.monotonic() - start
            waiting.pop(0)
            if not has_ended:
                if current.status != "ended by its time limit":
                    process.wait()
                    current.status = "crashed"
                    current.reason = f"exit code {process.returncode}: {_last_line(log)}"
                break
            if current.status == "failed":  # the process does not go on after it
                break
            write()
    finally:
        _end(process)
    write()
    return waiting


def _watch(
    process: subprocess.Popen, report: StageReport, events: Path, seen: int
) -> tuple[int, bool]:
    """Follow a stage until it ends, its process ends, or its time is over.

    Args:
        seen: so many lines of the events have been read.

    Returns:
        how many have been read now, and whether the stage has come to its end.
    """
    start = time.monotonic()
    while True:
        is_over = process.poll() is not None  # asked before its last lines are read
        for line in _lines(events)[seen:]:
            seen += 1
            if _take(report, json.loads(line)):
                return seen, True
        if is_over:
            return seen, False
        if time.monotonic() - start > report.limit:
            report.status = "ended by its time limit"
            return seen, False
        time.sleep(POLL)


def _take(report: StageReport, event: Mapping[str, Any]) -> bool:
    """Note an event; whether the stage has come to its end by it."""
    if event["event"] == "begin":
        report.status = "running"
    elif event["event"] == "row":
        report.rows.append(event["row"])
    else:
        report.status, report.reason = event["status"], event["reason"]
        return True
    return False


def _lines(events: Path) -> list[str]:
    """Complete ones."""
    if not events.exists():
        return []
    return events.read_text(encoding="utf-8").split("\n")[:-1]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _end(process: subprocess.Popen) -> None:
    """End a process and what it has started."""
    if process.poll() is None:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, kind)
            except ProcessLookupError:
                pass
            try:
                process.wait(GRACE)
                break
            except subprocess.TimeoutExpired:
                continue
    try:  # loader processes that have outlived it
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


@contextmanager
def _signals_raise() -> Iterator[None]:
    def handle(*_: object) -> None:
        raise _Ended

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(output: Path, facts: Mapping[str, Any], reports: Sequence[StageReport]) -> None:
    stages = [report.as_dict() for report in reports]
    document = json.dumps({"facts": facts, "stages": stages}, indent=2)
    for name, text in (("report.json", document), ("report.md", markdown(facts, stages))):
        write_text(output / name, text)
