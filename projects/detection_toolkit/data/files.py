"""Where the files of a data set may be, whose annotations a stranger may have written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

__all__ = ["check_file_name", "check_path", "find_escapes"]


def check_file_name(file_name: str, *, allow_outside: bool = False) -> str | None:
    """What is wrong with a file name of a JSON from a stranger; None for nothing.

    Args:
        file_name: as the JSON has it.
        allow_outside: it may lead out of the image folder.
    """
    if not file_name or file_name in (".", ".."):
        return "is empty"
    if "\0" in file_name:
        return "has a NUL character"
    try:
        os.fsencode(file_name)
    except UnicodeEncodeError:
        return "has characters that no file name can have"
    if allow_outside:
        return None
    # A data set made on one system may be used on another.
    posix, windows = PurePosixPath(file_name), PureWindowsPath(file_name)
    if posix.is_absolute() or windows.is_absolute() or windows.drive:
        return "is absolute"
    if ".." in posix.parts or ".." in windows.parts:
        return "leads upwards ('..')"
    return None


def check_path(path: str, root: str, *, allow_outside: bool = False) -> str | None:
    """:func:`check_file_name`, of a path that was joined from an image folder and a JSON's name.

    Args:
        path: as a dataset dict has it.
        root: the image folder; "" is the current one, where the JSON's names are the paths.
        allow_outside: it may lead out of the image folder.
    """
    prefix = os.path.join(root, "")
    if not root and "://" in path and not allow_outside:
        return "is an address"
    if path.startswith(prefix):
        return check_file_name(path[len(prefix) :], allow_outside=allow_outside)
    wrong = check_file_name(path, allow_outside=True)
    if wrong is not None or allow_outside:
        return wrong
    # Joined with an absolute name, or spelled in another way than the folder.
    if "://" not in root and _is_below(os.path.realpath(path), os.path.realpath(root)):
        return None
    return "is absolute" if os.path.isabs(path) else "lies elsewhere"


def find_escapes(root: str | Path, file_names: Iterable[str]) -> list[str]:
    """Those of the existing files that links lead out of a folder.

    Args:
        root: the folder; it may be a link itself.
        file_names: below it, by their names.
    """
    inside = os.path.realpath(root)
    names = list(map(str, file_names))
    folders = {os.path.dirname(n) for n in names}
    outside = {f for f in folders if not _is_below(os.path.realpath(f), inside)}
    links = {folder: _links(folder) for folder in folders - outside}
    return [
        name
        for name in names
        if os.path.dirname(name) in outside
        or (
            os.path.basename(name) in links[os.path.dirname(name)]
            and not _is_below(os.path.realpath(name), inside)
        )
    ]


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _links(folder: str) -> set[str]:
    """Names of the links in a folder, by one listing of it."""
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:  # a folder that is not there has no links
        return set()
