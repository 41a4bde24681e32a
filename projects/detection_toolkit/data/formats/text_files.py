"""Text files of data sets."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError
from ...texts import shown

__all__ = ["read_head", "read_lines"]

_HEAD = 65536  # bytes, in which the kind of a file shows


def read_lines(path: Path) -> list[str]:
    """Lines of a text in UTF-8, with or without a byte order mark.

    Raises:
        UserError: it is no such text.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{shown(path)} is no file")
    try:
        return path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)} is no text in UTF-8 ({error.reason})") from error


def read_head(path: Path) -> str:
    """The beginning of a text file, whatever its encoding; "" where it cannot be read."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return ""
    # UTF-16 has a NUL beside each plain letter.
    return head.replace(b"\0", b"").decode("utf-8", "replace").lstrip("\ufeff\ufffd")
