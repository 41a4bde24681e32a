"""Which format a data set is in, by what is there."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import UnknownNameError, UserError
from ...texts import shown
from . import coco, csv_tables, cvat, label_studio, labelme, voc, yolo
from .records import DataSource

__all__ = ["FORMATS", "Format", "open_source"]


_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


class Format(NamedTuple):
    """How data sets in a format are recognised and read."""

    title: str
    find: Callable[[Path], str | None]
    """What speaks for it at a path."""
    source: Callable[..., DataSource]
    """Of path and image root."""


FORMATS: dict[str, Format] = {
    "coco": Format(coco.TITLE, coco.find, coco.CocoSource),
    "yolo": Format(yolo.TITLE, yolo.find, yolo.YoloSource),
    "voc": Format(voc.TITLE, voc.find, voc.VocSource),
    "cvat": Format(cvat.TITLE, cvat.find, cvat.CvatSource),
    "label_studio": Format(label_studio.TITLE, label_studio.find, label_studio.LabelStudioSource),
    "labelme": Format(labelme.TITLE, labelme.find, labelme.LabelmeSource),
    "csv": Format(csv_tables.TITLE, csv_tables.find, csv_tables.CsvSource),
}
"""By the names that ``format=`` takes."""


def open_source(
    path: str | Path,
    *,
    format: str | None = None,
    image_root: str | Path | None = None,
    allow_outside: bool = False,
) -> DataSource:
    """The data set at a path.

    Args:
        path: of a folder or a file.
        format: a name of ``FORMATS``; by default what is there says it.
        image_root: folder of the images, where they are elsewhere than the format has them.
        allow_outside: what is there may lead to files elsewhere.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: it is in none of the formats, in several, or not in the given one; the message
            names what is there.
    """
    path = Path(path).expanduser()
    root = None if image_root is None else Path(image_root).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data set {path} does not exist")
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"image folder {root} of {path} does not exist")
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(str(format).lower(), FORMATS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UnknownNameError(f"no format {shown(format)}: {hint}there are {', '.join(FORMATS)}")
    found = {
        name: evidence
        for name, known in FORMATS.items()
        if (evidence := known.find(path)) is not None
    }
    if format is None:
        if not found:
            raise UserError(f"{path}: {_nothing(path)}. Known are {_titles()}")
        if len(found) > 1:
            kinds = " and ".join(f"{FORMATS[name].title} ({shown(e)})" for name, e in found.items())
            names = " or ".join(found)
            raise UserError(
                f"{path} has {len(found)} formats: {kinds}. Name one: --format {names} beside "
                "--data, or format= beside path"
            )
        (format,) = found
    elif format not in found:
        others = "; ".join(f"it looks like {FORMATS[n].title}: {e}" for n, e in found.items())
        raise UserError(
            f"{path} is not in the format {FORMATS[format].title}: {others or _nothing(path)}"
        )
    source = FORMATS[format].source(path, root, allow_outside=allow_outside)
    source.format = format
    return source


def _titles() -> str:
    return ", ".join(f"{known.title} ({name})" for name, known in FORMATS.items())


def _nothing(path: Path) -> str:
    """What is there, where it is no known format."""
    if path.suffix.lower() in _ARCHIVES:
        return "it is an archive: unpack it, and name the folder"
    if path.is_file():
        return "it is a file of no known format of annotations"
    children = list(path.iterdir())
    if not children:
        return "the folder is empty"
    endings = Counter(p.suffix.lower() or "no ending" for p in children if p.is_file())
    parts = [f"{count} files with {ending}" for ending, count in endings.most_common(4)]
    folders = sorted(p.name for p in children if p.is_dir())[:4]
    parts += [f"folders {', '.join(map(shown, folders))}"] if folders else []
    return f"the folder has no annotations in a known format; it has {', '.join(parts)}"
