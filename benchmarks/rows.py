"""What each benchmark hands to the page of all, ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Row", "add_rows_argument", "read_rows", "write_rows"]


class Row(NamedTuple):
    """One ratio of two forms that ran in one run."""

    what: str
    against: str
    ratio: float
    """How many times as fast."""
    memory: float | None = None
    """Of the other's, where it was measured."""


def add_rows_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=Path, metavar="FILE", help="also write ratios as JSON")


def write_rows(path: Path | None, rows: Iterable[Row]) -> None:
    """Nothing without a path."""
    if path is not None:
        path.write_text(json.dumps([row._asdict() for row in rows]))


def read_rows(path: Path) -> list[Row]:
    """What :func:`write_rows` has written."""
    return [Row(**row) for row in json.loads(path.read_text())]
