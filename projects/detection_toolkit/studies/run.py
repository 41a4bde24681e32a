"""Training the cells, one after another, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import portalocker
from tqdm import tqdm

from ..durable import open_log, write_text
from ..errors import UserError
from ..texts import parse_json
from ..visualization import read_metrics
from .environment import ROOT, facts
from .plan import Cell, Plan

__all__ = [
    "Outcome",
    "check_same_cell",
    "evaluate_cell",
    "evaluate_cells",
    "read_cell",
    "read_record",
    "run_cells",
    "split",
    "train_cell",
    "write_json",
]

RECORD = "cell.json"
LOG = "output.txt"
_LAST_LINES = 15
_PATIENCE = 60  # seconds that a stopped cell has to write its checkpoint


@dataclass(frozen=True)
class Outcome:
    """What became of the cells of one call."""

    finished: int
    found_finished: int
    """By an earlier call, or by another one at the same time."""
    failed: tuple[str, ...]
    skipped: tuple[str, ...]
    """Another process is training them."""

    def __str__(self) -> str:
        lines = [
            f"{self.finished} cells trained, {self.found_finished} were finished already, "
            f"{len(self.failed)} failed, {len(self.skipped)} are being trained elsewhere"
        ]
        return "\n".join([*lines, *(f"FAILED: {name}" for name in self.failed)])


def split(cells: Sequence[Cell], part: str) -> list[Cell]:
    """The cells of part "i/n", i from 1 to n: every n-th one.

    Raises:
        ValueError: it is not written so, or not 1 <= i <= n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    index, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= index <= count:
        raise UserError(f"--part {part}: write i/n with 1 <= i <= n, for example 2/4")
    return list(cells[index - 1 :: count])


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a cell, finished or not; None where there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        record = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it to train the cell") from error
    keys = ("variant", "seed", "status", "config", "overrides")
    if not isinstance(record, dict) or not all(key in record for key in keys):
        raise UserError(
            f"{path} is damaged (no record with {', '.join(keys)}): remove it to train the cell"
        )
    return record


def read_cell(cell: Cell) -> dict[str, Any] | None:
    """The record of a finished cell; None where it is not finished.

    Raises:
        ValueError: the record is damaged, or the folder holds a cell with other overrides or of
            another config.
    """
    record = read_record(cell.folder / RECORD)
    if record is None:
        return None
    check_same_cell(cell, record, place=cell.folder)
    return record if record["status"] == "finished" else None


def check_same_cell(cell: Cell, record: Mapping[str, Any], *, place: Path) -> None:
    """
    Raises:
        ValueError: the record is of a cell with other overrides or of another config.
    """
    ours = (cell.config, list(cell.overrides))
    if (record["config"], record["overrides"]) != ours:
        raise UserError(
            f"{place} holds a cell of {record['config']} with the overrides "
            f"{record['overrides']}, not of {ours[0]} with {ours[1]}: choose another --output, "
            "or another name for the variant"
        )


def run_cells(
    cells: Sequence[Cell],
    *,
    threads: int,
    after_each: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train what is not finished yet. A cell that fails does not stop the others.

    Args:
        cells: in this order.
        threads: of each training; another number may change the last digits.
        after_each: called when a cell has ended.
    """
    open_cells = [cell for cell in cells if read_cell(cell) is None]
    finished, failed, skipped = 0, [], []
    done_before = {cell.folder: _steps_to_resume_from(cell.folder) for cell in open_cells}
    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(cell.max_iter for cell in open_cells),
        initial=sum(done_before.values()),
        unit=" steps",
        smoothing=0,  # the mean rate: evaluation takes time, too
        mininterval=0.5 if on_terminal else 30,
        disable=not open_cells,
    ) as bar:
        for number, cell in enumerate(open_cells, start=1):
            bar.set_description(f"cell {number}/{len(open_cells)} ({cell.name})")
            start = bar.n - done_before[cell.folder]

            def show(steps: int, start: int = start) -> None:
                bar.update(max(0, start + steps - bar.n))

            with _locked(cell.folder) as lock:
                if lock is None:
                    skipped.append(cell.name)
                    tqdm.write(
                        f"{cell.name}: another process is training it, skipped "
                        f"(its output: {cell.folder / LOG})"
                    )
                elif read_cell(cell) is None:  # still, now that nobody else writes it
                    tqdm.write(f"{cell.name}\n$ {cell.command(threads=threads)}")
                    record = train_cell(cell, threads=threads, lock=lock, progress=show)
                    tqdm.write(_in_words(cell, record))
                    if record["status"] == "finished":
                        finished += 1
                    else:
                        failed.append(cell.name)
            bar.update(max(0, start + cell.max_iter - bar.n))
            after_each()
    return Outcome(
        finished=finished,
        found_finished=len(cells) - finished - len(failed) - len(skipped),
        failed=tuple(failed),
        skipped=tuple(skipped),
    )


def train_cell(
    cell: Cell,
    *,
    threads: int,
    lock: int | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Train one cell, from its last checkpoint if there is one, and write its record.

    Args:
        lock: the open file of the cell's lock. The training holds it as well, so that it stays
            locked if this process is killed and the training goes on alone.

    Returns:
        the record; its "status" is "finished" or "failed".
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    former = read_record(cell.folder / RECORD) or {}  # has failed or was interrupted
    resume = (cell.folder / "last_checkpoint").is_file()
    record: dict[str, Any] = {
        "variant": cell.variant,
        "seed": cell.seed,
        "status": "running",
        "config": cell.config,
        "overrides": list(cell.overrides),
        "command": cell.command(threads=threads),
        "threads": threads,
        # More than one where it was interrupted, and has gone on from a checkpoint.
        "starts": former.get("starts", 0) + 1,
        "minutes": former.get("minutes", 0.0),
        "cpu_minutes": former.get("cpu_minutes", 0.0),
        "peak_memory_mb": former.get("peak_memory_mb", 0),
        **facts(),
    }
    write_json(cell.folder / RECORD, record)
    start = time.perf_counter()
    with open_log(cell.folder / LOG) as log:
        process = subprocess.Popen(
            [sys.executable, *cell.arguments(resume=resume)],
            cwd=ROOT,
            env=_environment(threads),
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock,),
            # Ctrl-C is for this process, which lets the training write its checkpoint.
            start_new_session=True,
        )
        try:
            # wait4 tells the memory and processor time of this one process.
            while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                # The last evaluation counts as one iteration more.
                progress(min(_steps_done(cell.folder), cell.max_iter))
                time.sleep(0.3)
            process.returncode = os.waitstatus_to_exitcode(ended[1])
        finally:
            record["minutes"] = round(record["minutes"] + (time.perf_counter() - start) / 60, 3)
            record["status"] = "interrupted"  # unless what follows says otherwise
            try:
                write_json(cell.folder / RECORD, record)
            finally:
                _end(process)
    usage = ended[2]
    seconds = usage.ru_utime + usage.ru_stime
    record["cpu_minutes"] = round(record["cpu_minutes"] + seconds / 60, 3)
    record["peak_memory_mb"] = max(record["peak_memory_mb"], usage.ru_maxrss // 1024)
    record["status"] = "failed"
    if process.returncode == 0:
        try:
            record.update(_results(cell))
            record["status"] = "finished"
        except (OSError, ValueError, KeyError) as error:
            record["error"] = f"the training ended well, but {error}"
    else:
        record["error"] = f"the training ended with code {process.returncode}"
    write_json(cell.folder / RECORD, record)
    return record


def evaluate_cell(cell: Cell, overrides: Sequence[str], *, threads: int) -> None:
    """Evaluate a finished cell with other overrides, as on the test split; kept in its record.

    Raises:
        ValueError: the cell is not finished, or the evaluation has failed.
    """
    record = read_cell(cell)
    if record is None:
        raise UserError(f"{cell.name} is not finished: the test split is looked at afterwards")
    arguments = cell.test_arguments(overrides)
    folder = cell.folder / "test"
    with _locked(cell.folder) as lock:
        if lock is None:
            raise UserError(f"{cell.name}: another process is evaluating it")
        shutil.rmtree(folder, ignore_errors=True)  # of other overrides
        folder.mkdir()
        with open_log(folder / LOG) as log:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=_environment(threads),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    files = sorted(folder.glob("inference/*/metrics.json"))
    if done.returncode or len(files) != 1:
        raise UserError(
            f"{cell.name}: the evaluation on the test split has failed, see {folder / LOG}"
        )
    document = json.loads(files[0].read_text(encoding="utf-8"))
    record["test"] = {
        "overrides": list(overrides),
        "command": f"OMP_NUM_THREADS={threads} python {shlex.join(arguments)}",
        "dataset": document["dataset"],
        "weights": document["weights"],
        "metrics": document["results"]["bbox"],
    }
    write_json(cell.folder / RECORD, record)


def evaluate_cells(cells: Sequence[Cell], plan: Plan, *, threads: int) -> None:
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


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def write_json(path: Path, content: Any) -> None:
    """Write a file that is never seen half written."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _results(cell: Cell) -> dict[str, Any]:
    """What the training has left in its folder.

    Raises:
        ValueError: it has not evaluated to its end, or on several test sets.
    """
    files = sorted(cell.folder.glob("inference/*/metrics.json"))
    if len(files) != 1:
        raise UserError(f"{cell.folder} holds results of {len(files)} test sets, not of one")
    document = json.loads(files[0].read_text(encoding="utf-8"))
    series = read_metrics(cell.folder / "metrics.json")
    iterations, ap = series.get("bbox/AP", (np.zeros(0), np.zeros(0)))
    if not len(iterations) or iterations[-1] + 1 < cell.max_iter:
        raise UserError(f"{cell.folder / 'metrics.json'} ends before {cell.max_iter} iterations")
    by_stage = files[0].with_name("stage_metrics.json")
    return {
        "dataset": document["dataset"],
        "weights": document["weights"],
        "iterations": cell.max_iter,
        "metrics": document["results"]["bbox"],
        "curve": _curve(cell, iterations, ap),
        "class_curves": {
            key[len("bbox/AP-") :]: _curve(cell, *values)
            for key, values in series.items()
            if key.startswith("bbox/AP-")
        },
        "seconds_per_step": float(np.median(series["time"][1])) if "time" in series else None,
        "gpu_memory_mb": _gpu_memory(cell.folder / "log.txt"),
        "stage_metrics": json.loads(by_stage.read_text(encoding="utf-8"))
        if by_stage.is_file()
        else None,
    }


def _curve(cell: Cell, iterations: np.ndarray, values: np.ndarray) -> list[list[float]]:
    # The last evaluation counts as one iteration more.
    return [[min(int(i) + 1, cell.max_iter), float(v)] for i, v in zip(iterations, values)]


def _gpu_memory(log: Path) -> int | None:
    """The largest memory that Detectron2's console writer has shown, which it does on a GPU."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return max(map(int, re.findall(r"max_mem: (\d+)M", text)), default=None)


def _steps_done(folder: Path) -> int:
    """Iterations that the metrics file has reached."""
    try:
        with open(folder / "metrics.json", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            return int(json.loads(line)["iteration"]) + 1
    return 0


def _steps_to_resume_from(folder: Path) -> int:
    """Where a cell goes on, about; a bar needs no more."""
    return _steps_done(folder) if (folder / "last_checkpoint").is_file() else 0


def _end(process: subprocess.Popen) -> None:
    """Stop a training that still runs, as after Ctrl-C, and let it write its checkpoint."""
    if process.returncode is not None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """The open file of the cell's lock; None where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_log(folder / ".lock") as file:  # closing it unlocks, if no training has it, too
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
        except portalocker.exceptions.LockException:
            yield None
        else:
            yield file.fileno()


def _in_words(cell: Cell, record: Mapping[str, Any]) -> str:
    if record["status"] == "finished":
        ap = record["metrics"]["AP"]
        shown = "-" if ap is None else f"{ap:.3f}"
        return f"{cell.name}: AP {shown} after {record['minutes']:.1f} minutes"
    log = cell.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    text = "\n".join(f"    {line}" for line in lines)
    return f"{cell.name}: FAILED, {record['error']}; the end of {log}:\n{text}"
