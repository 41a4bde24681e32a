"""CSV: a box in each line, with the image's name, the class, and corners in pixels.

With a header, such as "filename,width,height,class,xmin,ymin,xmax,ymax" of TensorFlow's examples;
or without, as RetinaNet has them: "path,x1,y1,x2,y2,class".
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...durable import write_new
from ...errors import UserError
from ...texts import shown
from ..findings import FindingCollector
from .coordinates import to_number, to_side
from .image_files import locate, relative_name, size_of
from .records import Box, Picture, RecordSource
from .splits import SPLITS, split_folders, split_name
from .text_files import read_head, read_lines
from .written import Written, check_names, plain_number

__all__ = ["TITLE", "CsvSource", "find", "image_place", "write"]

TITLE = "CSV"
_HEADER = ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax")
_RETINANET = ("filename", "xmin", "ymin", "xmax", "ymax", "class")
# What else the columns are called.
_OTHERS = {
    "filename": ("file_name", "file", "path", "image", "image_path", "img", "image_name", "name"),
    "class": ("label", "class_name", "category", "category_name", "label_name"),
    "width": ("image_width", "img_width"),
    "height": ("image_height", "img_height"),
    "xmin": ("x1", "x_min", "left", "bbox_xmin"),
    "ymin": ("y1", "y_min", "top", "bbox_ymin"),
    "xmax": ("x2", "x_max", "right", "bbox_xmax"),
    "ymax": ("y2", "y_max", "bottom", "bbox_ymax"),
}
_COLUMNS = {other: name for name, others in _OTHERS.items() for other in (name, *others)}
_NEEDED = ("filename", "class", "xmin", "ymin", "xmax", "ymax")
_FIRST = 100  # files that are looked into, to know the format
_CLASS_TABLES = ("classes.csv", "_classes.csv", "class_list.csv")


def find(path: Path) -> str | None:
    """What speaks for the format; None for nothing."""
    for file, *_ in _files(path).values():
        if (columns := _columns(file)) is not None:
            where = file.relative_to(path) if path.is_dir() else Path(file.name)
            return f"{where.as_posix()} has the columns {', '.join(columns)}"
    return None


def _files(path: Path) -> dict[str | None, list[Path]]:
    """Tables by their splits."""
    if path.is_file():
        return {None: [path]} if path.suffix.lower() in (".csv", ".tsv") else {}

    def tables(folder: Path) -> list[Path]:
        files = sorted(folder.glob("*.csv"))[:_FIRST]
        return [f for f in files if f.name not in _CLASS_TABLES and _columns(f) is not None]

    divided = {s: found for s, f in split_folders(path).items() if (found := tables(f))}
    if divided:
        return {**divided}
    files: dict[str | None, list[Path]] = {}
    for file in tables(path):
        words = file.stem.replace("-", "_").split("_")
        split = next((s for s in map(split_name, words) if s is not None), None)
        files.setdefault(split, []).append(file)
    if len(files) > 1:
        files.pop(None, None)
    return files


def _columns(file: Path) -> Sequence[str] | None:
    """Of a table, by our names; None where it is no table of boxes."""
    lines = read_head(file).splitlines()
    if not lines:
        return None
    first = _cells(lines[0])
    named = [_COLUMNS.get(cell.strip().strip("\ufeff").lower(), "") for cell in first]
    if set(_NEEDED) <= set(named):
        return named
    if len(first) == len(_RETINANET) and (_are_numbers(first[1:5]) or not any(first[1:])):
        return _RETINANET
    return None


def _check_columns(file: Path) -> None:
    """
    Raises:
        UserError: two columns have one meaning.
    """
    counts = Counter(column for column in _columns(file) or () if column)
    for column, count in counts.items():
        if count > 1:
            names = ", ".join((column, *_OTHERS[column]))
            raise UserError(
                f"{file} has {count} columns that are its {column} ({names}): keep one of them"
            )


def _has_header(file: Path) -> bool:
    columns = _columns(file)
    return columns is not None and columns is not _RETINANET


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        return bool([to_number(cell, "x") for cell in cells])
    except UserError:
        return False


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)


def _cells(line: str, delimiter: str | None = None) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter or _delimiter(line)), [])


class CsvSource(RecordSource):
    """A table, or a folder with one of each split.

    Args:
        path: of file or folder.
        image_root: of the images; by default the folder of the table, or images/ in it.
        allow_outside: links may lead out of the folder.

    Raises:
        UserError: a split has several tables, or a table several columns of one meaning.
    """

    def __init__(self, path: Path, image_root: Path | None = None, *, allow_outside: bool = False):
        self.path = path
        self.evidence = find(path) or ""
        self.allow_outside = allow_outside
        self._folder = path if path.is_dir() else path.parent
        self._given_root = image_root
        self.image_root = image_root or self._folder
        self._files: dict[str | None, Path] = {}
        for split, (file, *others) in _files(path).items():
            if others:
                named = ", ".join(shown(p.relative_to(path)) for p in (file, *others)[:4])
                raise UserError(
                    f"{path} has several tables of the split {split or 'with all images'}: "
                    f"{named}. Name one of them as the path, or move the others away"
                )
            _check_columns(file)
            self._files[split] = file
        if set(self._files) == {"train"}:
            self._files = {None: self._files["train"]}
        self.splits = tuple(s for s in SPLITS if s in self._files)

    def class_names(self) -> list[str] | None:
        """Of classes.csv, in which RetinaNet has lines of name and number."""
        for folder in (self._folder, *{file.parent for file in self._files.values()}):
            for name in _CLASS_TABLES:
                if not (folder / name).is_file():
                    continue
                lines = read_lines(folder / name, None if self.allow_outside else self._folder)
                rows = [_cells(line, ",") for line in lines if line.strip()]
                numbered = [
                    (int(r[1]), r[0])
                    for r in rows
                    if len(r) == 2 and r[1].isdecimal() and len(r[1]) < 10
                ]
                if len(numbered) == len(rows):
                    return [label for _, label in sorted(numbered)]
        return None

    def pictures(self, split: str | None, found: FindingCollector) -> Iterator[Picture]:
        for own, file in self._files.items():
            yield from self._pictures_of(file, own, found)

    def _pictures_of(
        self, file: Path, split: str | None, found: FindingCollector
    ) -> Iterator[Picture]:
        columns = _columns(file)
        if columns is None:
            raise UserError(f"{file} has no columns {', '.join(_NEEDED)}")
        name = shown(relative_name(file, self._folder))
        boxes: dict[str, list[Box]] = {}
        sizes: dict[str, tuple[int, int]] = {}
        places: dict[str, str] = {}
        is_named = file == self.path
        lines = read_lines(file, None if self.allow_outside or is_named else self._folder)
        delimiter = _delimiter(lines[0])
        for number, line in enumerate(lines, start=1):
            if not line.strip() or (number == 1 and _has_header(file)):
                continue
            place = f"{name}, line {number}"
            cells = [cell.strip() for cell in _cells(line, delimiter)]
            try:
                if len(cells) != len(columns):
                    raise UserError(f"has {len(cells)} columns, and the first line {len(columns)}")
                row = dict(zip(columns, cells))
                if not row["filename"]:
                    raise UserError("names no image")
                image = row["filename"]
                boxes.setdefault(image, [])
                places.setdefault(image, place)
                size = (to_side(row.get("width"), "width"), to_side(row.get("height"), "height"))
                if all(size) and sizes.setdefault(image, size) != size:
                    raise UserError(f"has the size {size}, and {sizes[image]} before")
                if any(row[key] for key in _NEEDED[1:]):  # else an image without objects
                    boxes[image].append(_box(row, place))
            except UserError as error:
                found.add("entries", f"{place} {error}")
        for image, own in boxes.items():
            file_name = self._locate(image, file)
            known = sizes.get(image) or size_of(file_name, self.image_root, places[image], found)
            if known is not None:
                yield Picture(file_name, *known, tuple(own), places[image], split)

    def _locate(self, name: str, table: Path) -> str:
        folders = [self.image_root]
        if self._given_root is None:
            folders = [table.parent, table.parent / "images", self._folder]
            folders = [f for f in dict.fromkeys(folders) if f.is_dir()]
        return locate(name, self.image_root, folders)


def _box(row: Mapping[str, str], place: str) -> Box:
    """
    Raises:
        UserError: what is wrong with the line.
    """
    x0, y0, x1, y1 = (to_number(row[key] or None, key) for key in _NEEDED[2:])
    if not row["class"]:
        raise UserError("has no class")
    return Box(row["class"], (x0, y0, x1, y1), place)


def write(
    folder: Path,
    parts: Mapping[str | None, Sequence[Written]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """SPLIT.csv and classes.csv; see :func:`.conversion.convert`. Crowds are left out.

    Raises:
        UserError: the name of a class or image cannot be written.
    """
    names = [c["name"] for c in categories]
    check_names(names, TITLE)
    write_new(folder / _CLASS_TABLES[0], _table((n, i) for i, n in enumerate(names)))
    for split, pictures in parts.items():
        check_names([written.picture.file_name for written in pictures], TITLE)
        rows: list[Sequence[object]] = [_HEADER]
        for written in pictures:
            picture = written.picture
            name = written.path_in(image_place(split))
            first = (name, picture.width, picture.height)
            boxes = [box for box in picture.boxes if not box.is_crowd]
            rows += [(*first, box.label, *map(plain_number, box.corners)) for box in boxes]
            if not boxes:
                rows.append((*first, "", "", "", "", ""))
        write_new(folder / f"{split or 'boxes'}.csv", _table(rows))


def _table(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def image_place(split: str | None) -> str:
    """Folder of the images of a split."""
    return f"images/{split}" if split else "images"
