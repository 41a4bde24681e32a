"""Text files of data sets."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import UserError
from ...texts import shown
from ..files import is_within

__all__ = ["check_inside", "read_head", "read_lines"]

_HEAD = 65536  # bytes, in which the kind of a file shows


def check_inside(path: Path, root: Path | None) -> None:
    """
    Args:
        path: of a file that nobody has named, but that was found.
        root: the folder that links must not lead out of; None: they may.

    Raises:
        UserError: they do.
    """
    if root is not None and not is_within(os.path.realpath(path), os.path.realpath(root)):
        raise UserError(
            f"{shown(path)} is a link out of the folder {shown(root)}. If you trust its author, "
            "set dataloader.train.dataset.allow_outside=true"
        )


def read_lines(path: Path, root: Path | None = None) -> list[str]:
    """Lines of a text in UTF-8, with or without a byte order mark.

    Args:
        path: of the text.
        root: see :func:`check_inside`.

    Raises:
        UserError: it is no such text, or leads out of the root.
        OSError: it cannot be read.
    """
    check_inside(path, root)
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
