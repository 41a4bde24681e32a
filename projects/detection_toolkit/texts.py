"""Texts of others, as they may be printed: names of classes and files are chosen by strangers.

A terminal obeys some characters (colours, the window's title, what it answers as if it were typed),
and Markdown reads others as its own marks. What pictures hold is made drawable by
:func:`detection_toolkit.visualization.fonts.drawable`, and HTML by :func:`html.escape`.
"""

from __future__ import annotations

import html
import json
import logging
import re
from typing import Any

__all__ = ["FILE_ONLY", "Printable", "in_markdown", "parse_json", "printable", "shown"]

# ``extra`` of a message that is for log.txt alone, and not for the console.
FILE_ONLY = {"file_only": True}

# Colours and bold type, which Detectron2 and this project's tables have.
_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")
_MARKS = re.compile(r"([\\`*_{}\[\]#|~$])")


def shown(text: object) -> str:
    """A name for a message of one line: as it is, or quoted where it has strange letters."""
    text = str(text)
    return text if text.isprintable() else ascii(text)


def printable(text: str) -> str:
    """A message of any number of lines, in which strange letters are written as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


class Printable(logging.Filter):
    """Makes what is logged printable; colours stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        parts = _COLOURS.split(text)
        clean = "".join(p if _COLOURS.fullmatch(p) else printable(p) for p in parts)
        if clean != text:
            record.msg, record.args = clean, None
        return True


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, of a text that may be a stranger's.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def in_markdown(text: object) -> str:
    """A name within a line or a table of Markdown, in which nothing of it is a mark."""
    # Not every reader knows escapes of these three.
    return _MARKS.sub(r"\\\1", html.escape(shown(text), quote=False))
