"""The parser that commands begin with: a description, and examples at the end of --help."""

from __future__ import annotations

import argparse

from ..program import program
from .shipped import shipped_config

__all__ = ["examples", "make_parser"]


def make_parser(description: str, lines: str, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser without arguments.

    Args:
        description: docstring of the command.
        lines: see :func:`examples`.
        prog: how the command was called; by default see :func:`~detection_toolkit.program.program`.
    """
    prog = prog or program()
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=examples(lines, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def examples(lines: str, prog: str) -> str:
    """The end of a command's ``--help``.

    Args:
        lines: command lines, in which ``PROG`` stands for the command, and ``CONFIG`` for the
            config of the shipped checkpoint.
        prog: how the command was called.
    """
    text = lines.strip("\n").replace("PROG", prog).replace("CONFIG", shipped_config())
    return "examples:\n" + "\n".join(f"  {line}".rstrip() for line in text.splitlines())
