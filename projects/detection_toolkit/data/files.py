"""Where the files of a data set may be, whose annotations a stranger may have written."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..texts import shown
from .findings import FindingCollector

__all__ = [
    "check_file_name",
    "check_path",
    "find_escapes",
    "is_address",
    "is_within",
    "judge_file_names",
    "missing_files",
    "other_spelling",
]


# At the beginning of a path alone: a file in a folder is one, whatever its name.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_address(path: str) -> bool:
    """Whether a path is one that a handler of Detectron2's ``PathManager`` may know."""
    return _ADDRESS.match(path) is not None


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
    if is_address(file_name):
        return "is an address"
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
    if path.startswith(prefix):
        return check_file_name(path[len(prefix) :], allow_outside=allow_outside)
    wrong = check_file_name(path, allow_outside=True)
    if wrong is not None or allow_outside:
        return wrong
    # Joined with an absolute name, or spelled in another way than the folder.
    if "://" not in root and is_within(os.path.realpath(path), os.path.realpath(root)):
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
    outside = {f for f in folders if not is_within(os.path.realpath(f), inside)}
    links = {folder: _links(folder) for folder in folders - outside}
    return [
        name
        for name in names
        if os.path.dirname(name) in outside
        or (
            os.path.basename(name) in links[os.path.dirname(name)]
            and not is_within(os.path.realpath(name), inside)
        )
    ]


def is_within(path: str, folder: str) -> bool:
    """Whether a real path is that of a folder or below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _links(folder: str) -> set[str]:
    """Names of the links in a folder, by one listing of it."""
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:  # a folder that is not there has no links
        return set()


def missing_files(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Those of the paths that are no files; addresses are taken to be there.

    Each folder is listed once: to ask for every image of COCO takes minutes on a network disk.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for path in map(os.fspath, paths):
        if is_address(path):
            continue
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or "."))
            except (OSError, ValueError):  # also for a NUL in the name
                listed[folder] = set()
        # A disk may take two spellings of a name for the same, and a list of names does not.
        if name not in listed[folder] and not os.path.isfile(path):
            missing.append(path)
    return missing


def judge_file_names(
    found: FindingCollector,
    images: Mapping[Any, Mapping[str, Any]],
    root: str,
    *,
    allow_outside: bool,
) -> dict[Any, str]:
    """Note the file names of a data set that cannot or may not be used.

    Args:
        found: is told.
        images: entries of a document by their ids.
        root: the image folder, "" for the current one.
        allow_outside: names may lead out of it.

    Returns:
        the other names by the ids of the images; with / for \\ where that is how they are meant.
    """
    names: dict[Any, str] = {}
    for number, image in images.items():
        name = image["file_name"]
        wrong = check_file_name(name, allow_outside=allow_outside)
        if wrong is None:
            names[number] = name
            continue
        text = f"{found.image(number)} has file_name {ascii(name)}, which {wrong}"
        if check_file_name(name, allow_outside=True) is not None:
            found.add("file_name", text, number)
        else:
            found.add("outside_root", text + _advice_outside(name), number)
    names.update(_slashes(found, names, root))
    paths = {number: os.path.join(root, name) for number, name in names.items()}
    if not allow_outside:
        ids = {path: number for number, path in paths.items()}
        for path in find_escapes(root or os.curdir, paths.values()):
            found.add("links", shown(path), ids[path])
            names.pop(ids[path], None)
    uses: dict[str, int] = {}
    for path in paths.values():
        uses[path] = uses.get(path, 0) + 1
    for path, count in uses.items() if len(uses) < len(paths) else ():
        if count > 1:
            found.add("same_file", f"{shown(path)} ({count} times)")
    # All of them is a wrong folder. If some are missing, it is for the loaders to say.
    if paths and len(missing_files(paths.values())) == len(paths):
        found.add("folder", _wrong_folder(root, next(iter(names.values()), "")))
    return names


def _advice_outside(name: str) -> str:
    advice = (
        ", outside of the image folder. If you trust its author, set allow_outside=true beside "
        "json_file or path"
    )
    if PureWindowsPath(name).drive and os.name != "nt":
        advice += (
            "; or, as it is a path of a Windows computer, take what leads to the image folder out "
            "of the file names"
        )
    return advice


def _slashes(found: FindingCollector, names: Mapping[Any, str], root: str) -> dict[Any, str]:
    """Names that were written on Windows, for where \\ is a letter like others."""
    if os.sep == "\\":
        return {}
    paths = {os.path.join(root, n): i for i, n in names.items() if "\\" in n}
    changed = {}
    for path in missing_files(paths):
        number = paths[path]
        changed[number] = names[number].replace("\\", "/")
        found.add("backslashes", f"{found.image(number)}: {shown(names[number])}", number)
    return changed


def _wrong_folder(root: str, name: str) -> str:
    text = (
        f"image folder {root} does not hold its images: for example, there is no "
        f"{os.path.join(root, name)}. "
    )
    folder = os.path.abspath(root)
    if (other := other_spelling(os.path.join(folder, name))) is not None:
        return text + (
            f"There is {shown(other)}: case, accents and spaces must be those of the file"
        )
    above = os.path.dirname(folder)
    places = [folder, above, os.path.dirname(above), *_folders_in(folder), *_folders_in(above)]
    parts = PurePosixPath(name).parts
    for start in range(len(parts)):
        for place in places:
            if not os.path.isfile(os.path.join(place, *parts[start:])):
                continue
            if start == 0:
                return text + f"It is in {place}: set image_root={place}"
            return text + (
                f"There is {os.path.join(place, *parts[start:])}: take {'/'.join(parts[:start])}/ "
                f"out of the file names, and set image_root={place}"
            )
    return text + "Set image_root to the folder that the file names are relative to"


def other_spelling(path: str) -> str | None:
    """The name of a file that differs in upper and lower case, code of accents, or spaces alone."""
    folder, name = os.path.split(path)
    try:
        names = sorted(os.listdir(folder or os.curdir))
    except (OSError, ValueError):
        return None
    return next((n for n in names if _plain(n) == _plain(name)), None)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir())
    except OSError:
        return []
