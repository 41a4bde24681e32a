"""The image files of a data set: which there are, and how large they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ...texts import shown
from ..files import check_file_name, find_escapes, is_within
from ..findings import FindingCollector
from ..images import PICTURE_SUFFIXES, shown_size

__all__ = [
    "is_below",
    "is_picture",
    "locate",
    "picture_files",
    "picture_sizes",
    "relative_name",
    "size_of",
]

_THREADS = 8  # headers are waited for, on a network disk, more than they are computed on


def picture_files(folder: Path) -> list[Path]:
    """Pictures in a folder and the folders below it, in the order of their names."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(place, n) for n in names if is_picture(n)]
    return sorted(found, key=lambda path: path.as_posix())


def is_picture(name: str) -> bool:
    """Whether a file is taken for a picture, by the ending of its name."""
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path leads to a folder or below it, once links and .. are followed."""
    return is_within(os.path.realpath(path), os.path.realpath(folder))


def relative_name(path: Path, root: Path) -> str:
    """The name that a document has for an image file: below the root, or else in full."""
    path, root = Path(os.path.normpath(path)), Path(os.path.normpath(root))
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def picture_sizes(
    paths: Iterable[Path], root: Path, found: FindingCollector, *, allow_outside: bool
) -> dict[Path, tuple[int, int]]:
    """(width, height) of images, as they are shown, from their headers.

    Those that may not be opened, as links lead them out of the folder, have the size 1 x 1: whoever
    judges the document refuses them. Those that cannot be read are findings.
    """
    paths = list(paths)
    escapes = set() if allow_outside else set(find_escapes(root, map(str, paths)))

    def look(path: Path) -> tuple[int, int] | None:
        return (1, 1) if str(path) in escapes else shown_size(path)

    sizes = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, size in zip(paths, pool.map(look, paths)):
            if size is not None:
                sizes[path] = size[::-1]
            elif path.is_file():
                found.add("unreadable", f"image {shown(path)} cannot be read: it is no picture")
            else:
                found.add("missing", f"image {shown(path)} does not exist")
    return sizes


def locate(name: str, root: Path, folders: Sequence[Path]) -> str:
    """The image file that a name in an annotation file means.

    Paths of another computer are cut at the left until what is left is there.

    Args:
        name: as it is written, of a file of any system.
        root: of the data set: only files below it are found.
        folders: below the root, that the name may be relative to.

    Returns:
        its path from the root; where it is not there, the name as a document has it that is to be
        judged.
    """
    text = name.replace("\\", "/")
    plain = PurePosixPath(text)
    for folder in folders:
        path = Path(os.path.normpath(folder / plain))
        if path.is_relative_to(os.path.normpath(root)) and path.is_file():
            return relative_name(path, root)
    parts = [p for p in plain.parts if p not in ("/", "..") and not p.endswith(":")]
    for start in range(len(parts)):
        for folder in folders:
            if (path := folder.joinpath(*parts[start:])).is_file():
                return relative_name(path, root)
    is_usable = check_file_name(text) is None
    return relative_name(folders[0] / plain, root) if is_usable else name


def size_of(name: str, root: Path, place: str, found: FindingCollector) -> tuple[int, int] | None:
    """(width, height) of an image whose annotations do not say it; None where it is a finding."""
    if check_file_name(name) is not None:
        return 1, 1  # whoever judges the document refuses it
    path = root / name
    size = None if find_escapes(root, [str(path)]) else shown_size(path)
    if size is not None:
        return size[::-1]
    kind, what = ("unreadable", "cannot be read") if path.is_file() else ("missing", "is not there")
    found.add(kind, f"{place}: the image {shown(name)} {what}, and nothing says its size")
    return None
