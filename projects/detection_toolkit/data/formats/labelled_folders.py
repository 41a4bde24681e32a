"""Folders of images that have labels as YOLO has them, judged by what really lies beside them."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .image_files import is_picture
from .text_files import read_head

__all__ = ["FIRST", "data_folders", "file_lookup", "is_label"]

FIRST = 20  # files that are looked into, to know the format
_LABEL = re.compile(r"\d+( -?[\d.]+(e-?\d+)?){4,}(\s|\Z)")


def is_label(head: str) -> bool:
    """Whether a text begins as YOLO's labels do."""
    return _LABEL.match(head) is not None


def file_lookup() -> Callable[[Path], bool]:
    """What says of many paths whether files are there, and lists each of their folders once."""
    listed: dict[str, frozenset[str]] = {}

    def is_file(path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = _list(folder or os.curdir).names
        names = listed[folder]
        # A disk may take two spellings of a name for the same, and a list of names does not.
        return name in names or (bool(names) and path.is_file())

    return is_file


def data_folders(images: Iterable[Path]) -> list[Path] | None:
    """Folders that hold images and their labels.

    A folder of images has labels if half of its pictures or more have, or all that are named. Links
    are followed first: labels beside a link say nothing about the images that it leads to.

    Args:
        images: by their paths.

    Returns:
        for each folder of images the one that holds it and its labels, without links; None if a
        folder has no labels, or an image is a link to such a folder.
    """
    named: dict[str, set[str]] = {}
    for image in images:
        folder, name = os.path.split(image)
        named.setdefault(folder, set()).add(name)
    real: dict[str, set[str]] = {}
    for folder, names in named.items():
        real.setdefault(os.path.realpath(folder), set()).update(names)
    linked: dict[str, set[str]] = {}
    for folder, names in real.items():
        for link in names & _list(folder).links:
            place, name = os.path.split(os.path.realpath(os.path.join(folder, link)))
            linked.setdefault(place, set()).add(name)
    found = []
    for folder, names in real.items():
        data = _data_folder(folder, names)
        if data is None:
            return None
        found.append(data)
    if any(_data_folder(folder, names) is None for folder, names in linked.items()):
        return None
    return found


def _data_folder(folder: str, named: set[str]) -> Path | None:
    pictures = named | {name for name in _list(folder).names if is_picture(name)}
    for data, labels in _label_places(Path(folder)):
        stems = {n[:-4] for n in _list(str(labels)).names if n.endswith(".txt")}
        labelled = {n for n in pictures if os.path.splitext(n)[0] in stems}
        if 2 * len(labelled) < len(pictures):
            if not named <= labelled:
                continue
            labelled = named
        paths = (labels / f"{os.path.splitext(n)[0]}.txt" for n in sorted(labelled))
        heads = (head for path in paths if (head := read_head(path)).strip())  # others: background
        known = [is_label(head) for head in itertools.islice(heads, FIRST)]
        if known and 2 * sum(known) >= len(known):
            return data
    return None


def _label_places(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(The folder that holds both, the labels' folder) of a folder of images."""
    parts = folder.parts
    last = max((i for i, part in enumerate(parts) if part == "images"), default=0)
    if last:
        yield Path(*parts[:last]), Path(*parts[:last], "labels", *parts[last + 1 :])
    yield folder, folder


class _Listing(NamedTuple):
    names: frozenset[str]
    links: frozenset[str]


def _list(folder: str) -> _Listing:
    """What is in a folder; nothing for one that is not there.

    A folder is listed once until it changes: to ask for the label of every image of COCO takes
    minutes on a network disk.
    """
    try:
        return _list_once(folder, os.getcwd(), os.stat(folder).st_mtime_ns)
    except (OSError, ValueError):  # also for a NUL in the name
        return _Listing(frozenset(), frozenset())


@functools.lru_cache(maxsize=64)
def _list_once(folder: str, current: str, changed: int) -> _Listing:
    """Of a folder, relative to the current one, that was changed at a time."""
    with os.scandir(folder) as entries:
        kinds = {entry.name: entry.is_symlink() for entry in entries}
    return _Listing(frozenset(kinds), frozenset(name for name, is_link in kinds.items() if is_link))
