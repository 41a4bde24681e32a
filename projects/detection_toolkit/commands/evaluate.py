"""Evaluate a detector: what ``train --eval-only`` does."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.parsers import Parser
from . import train

__all__ = ["get_parser", "main"]


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    return train.get_parser(prog, evaluation=True)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """See :func:`.train.main`."""
    train.main(argv, prog=prog, evaluation=True)
