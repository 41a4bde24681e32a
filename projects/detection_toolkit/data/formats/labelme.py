"""labelme: a JSON for each image, with shapes in pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...durable import write_new
from ...errors import UserError
from ...texts import shown
from ..findings import FindingCollector
from .coordinates import corners_around, points_of, to_side
from .image_files import is_below, locate, relative_name, size_of
from .json_files import keys_of, list_of, read_json, text_of
from .records import Box, Picture, RecordSource
from .splits import SPLITS, split_folders
from .text_files import read_head, read_lines
from .written import Written, check_names

__all__ = ["TITLE", "LabelmeSource", "find", "image_place", "write"]

TITLE = "labelme"
_FIRST = 20  # files that are looked into, to know the format
_NOT_CLASSES = ("__ignore__", "_background_")


def find(path: Path) -> str | None:
    """What speaks for the format; None for nothing."""
    if path.is_file():
        return f"{path.name} has shapes" if _is_labelme(path) else None
    for folder in _folders(path).values():
        for file in sorted(folder.glob("*.json"))[:_FIRST]:
            if _is_labelme(file):
                return f"{file.relative_to(path).as_posix()} has shapes"
    return None


def _is_labelme(path: Path) -> bool:
    head = read_head(path) if path.suffix.lower() == ".json" else ""
    return head.lstrip().startswith("{") and '"shapes"' in head


def _folders(path: Path) -> dict[str | None, Path]:
    divided = {s: f for s, f in split_folders(path).items() if any(f.glob("*.json"))}
    if divided:
        return {**divided}
    return {None: path if any(path.glob("*.json")) else path / "annotations"}


class LabelmeSource(RecordSource):
    """A folder of JSON files, or one of them.

    Args:
        path: of folder or file.
        image_root: of the images, where they are not where the JSON files say, nor beside them.
        allow_outside: links may lead out of the folder.
    """

    def __init__(self, path: Path, image_root: Path | None = None, *, allow_outside: bool = False):
        self.path = path
        self.evidence = find(path) or ""
        self.allow_outside = allow_outside
        self._folder = path if path.is_dir() else path.parent
        self.image_root = image_root or self._folder
        self._files: dict[str | None, list[Path]] = {None: [path]}
        if path.is_dir():
            self._files = {
                split: sorted(f for f in place.glob("*.json") if _is_labelme(f))
                for split, place in _folders(path).items()
            }
        if set(self._files) == {"train"}:
            self._files = {None: self._files["train"]}
        self.splits = tuple(s for s in SPLITS if s in self._files)

    def class_names(self) -> list[str] | None:
        """Of labels.txt, which labelme is given and some keep beside the files."""
        table = self._folder / "labels.txt"
        if not table.is_file():
            return None
        root = None if self.allow_outside else self._folder
        lines = [line.strip() for line in read_lines(table, root)]
        return [line for line in lines if line and line not in _NOT_CLASSES]

    def pictures(self, split: str | None, found: FindingCollector) -> Iterator[Picture]:
        for own, files in self._files.items():
            for file in files:
                name = shown(relative_name(file, self._folder))
                try:
                    picture = self._picture(file, name, own, found)
                except UserError as error:
                    found.add("entries", str(error))
                    continue
                if picture is not None:
                    yield picture

    def _picture(
        self, file: Path, name: str, split: str | None, found: FindingCollector
    ) -> Picture | None:
        is_named = file == self.path
        if not (self.allow_outside or is_named or is_below(file, self._folder)):
            raise UserError(f"{name} is a link out of the folder")
        content = keys_of(read_json(file), name)
        try:
            image = text_of(content, "imagePath")
            sides = [to_side(content.get(f"image{side}"), side) for side in ("Width", "Height")]
            shapes = list_of(content, "shapes")
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        folders = [self.image_root]
        if self.image_root == self._folder:
            folders = [file.parent, self._folder, self._folder / "images"]
        image = locate(image, self.image_root, folders)
        if not all(sides):
            size = size_of(image, self.image_root, name, found)
            if size is None:
                return None
            sides = [*size]
        boxes = []
        for number, shape in enumerate(shapes, start=1):
            place = f"{name}, shape {number}"
            try:
                box = _box(keys_of(shape, "it"), place, found)
            except UserError as error:
                found.add("entries", f"{place}: {error}")
                continue
            if box is not None:
                boxes.append(box)
        return Picture(image, sides[0], sides[1], tuple(boxes), name, split)


def _box(shape: Any, place: str, found: FindingCollector) -> Box | None:
    """Of a shape; None for one that has no box.

    Raises:
        UserError: what is wrong with it.
    """
    label = text_of(shape, "label")
    kind = shape.get("shape_type") or "polygon"  # of the first versions
    if label in _NOT_CLASSES:
        return None
    if kind not in ("rectangle", "polygon", "circle", "mask", "oriented_rectangle"):
        found.add("shapes", f"{place}: {shown(kind)}")
        return None
    points = points_of(shape.get("points"), "points")
    corners: Sequence[float]
    polygons: tuple[tuple[float, ...], ...] = ()
    if kind == "circle":
        if len(points) != 2:
            raise UserError(f"a circle has 2 points, not {len(points)}")
        (x, y), (edge_x, edge_y) = points
        radius = ((edge_x - x) ** 2 + (edge_y - y) ** 2) ** 0.5
        corners = (x - radius, y - radius, x + radius, y + radius)
    else:
        least = 3 if kind == "polygon" else 2
        if len(points) < least:
            raise UserError(f"a {kind} has {least} points or more, not {len(points)}")
        corners = corners_around(points)
        if kind == "polygon":
            polygons = (tuple(v for point in points for v in point),)
        elif kind == "oriented_rectangle":
            found.add("rotated", f"{place}: {shown(label)}")
    x0, y0, x1, y1 = corners
    return Box(label, (x0, y0, x1, y1), place, polygons)


def write(
    folder: Path,
    parts: Mapping[str | None, Sequence[Written]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """A JSON beside each image, and labels.txt. Crowds are left out.

    Raises:
        UserError: the name of a class cannot be written.
    """
    names = [c["name"] for c in categories]
    check_names(names, TITLE)
    lines = [*_NOT_CLASSES, *names]
    write_new(folder / "labels.txt", "".join(f"{n}\n" for n in lines))
    for split, pictures in parts.items():
        for written in pictures:
            picture = written.picture
            path = folder / image_place(split) / picture.file_name
            shapes = [
                {
                    "label": box.label,
                    "points": [list(box.corners[:2]), list(box.corners[2:])],
                    "group_id": None,
                    "shape_type": "rectangle",
                    "flags": {},
                }
                for box in picture.boxes
                if not box.is_crowd
            ]
            content = {
                "version": "5.5.0",
                "flags": {},
                "shapes": shapes,
                "imagePath": path.name,
                "imageData": None,
                "imageHeight": picture.height,
                "imageWidth": picture.width,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_new(path.with_suffix(".json"), json.dumps(content, indent=2))


def image_place(split: str | None) -> str:
    """Folder of the images of a split."""
    return split or "."
