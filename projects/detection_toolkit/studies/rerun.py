"""Does a finished cell come out the same once more?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..durable import write_text
from ..errors import UserError
from .plan import Cell, Plan
from .results import check_results
from .run import check_same_cell, read_cell, train_cell

__all__ = ["rerun", "stored_record"]


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
                progress=lambda steps: bar.update(steps - bar.n),
            )
        if new["status"] != "finished":
            log = cell.folder / "rerun_output.txt"
            text = (Path(folder) / "output.txt").read_text(encoding="utf-8", errors="replace")
            write_text(log, text)
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
