"""CVAT for images 1.1: one XML with the shapes of all images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from ...durable import write_new
from ...errors import UserError
from ...texts import shown
from ..findings import FindingCollector
from .coordinates import corners_around, points_of, to_number, to_side, turned
from .image_files import locate, size_of
from .records import Box, Picture, RecordSource
from .splits import SPLITS, split_name
from .text_files import read_head
from .written import Written, check_names, plain_number
from .xml_tree import Element, read_xml

__all__ = ["TITLE", "CvatSource", "find", "image_place", "write"]

TITLE = "CVAT for images"
_NAME = "annotations.xml"


def find(path: Path) -> str | None:
    """What speaks for the format; None for nothing."""
    file = path / _NAME if path.is_dir() else path
    is_cvat = file.suffix.lower() == ".xml" and "<annotations>" in read_head(file)
    return f"{file.name} begins as CVAT's files do" if is_cvat else None


class CvatSource(RecordSource):
    """An export of CVAT.

    Args:
        path: of the XML, or of the folder that has annotations.xml.
        image_root: of the images, where they are not in images/ or beside the XML.
        allow_outside: links may lead out of the folder.

    Raises:
        UserError: it is no XML, of videos, or a link out of the folder.
    """

    def __init__(self, path: Path, image_root: Path | None = None, *, allow_outside: bool = False):
        self.path = path
        self.evidence = find(path) or ""
        self._file = path / _NAME if path.is_dir() else path
        self.image_root = image_root or self._file.parent
        self._root = read_xml(self._file, None if allow_outside or not path.is_dir() else path)
        if self._root.name != "annotations":
            raise UserError(
                f"{self._file} has <{shown(self._root.name)}> at its top, and CVAT <annotations>"
            )
        if self._root.first("image") is None and self._root.first("track") is not None:
            raise UserError(
                f"{self._file} is CVAT for video, with tracks: export it as CVAT for images 1.1"
            )
        subsets = {split_name(i.attributes.get("subset", "")) for i in self._root.all("image")}
        if subsets == {"train"} or subsets == {"train", None}:
            subsets = set()
        self.splits = tuple(s for s in SPLITS if s in subsets)

    def class_names(self) -> list[str] | None:
        meta = self._root.first("meta")
        for owner in ("task", "project", "job"):
            labels = None if meta is None else meta.first(owner, "labels")
            if labels is not None:
                # Parts of skeletons have a parent.
                of_top = (label for label in labels.all("label") if not label.text_of("parent"))
                return list(dict.fromkeys(n for e in of_top if (n := e.text_of("name"))))
        return None

    def pictures(self, split: str | None, found: FindingCollector) -> Iterator[Picture]:
        for element in self._root.all("image"):
            place = f"{self._file.name}, line {element.line}"
            try:
                picture = self._picture(element, place, found)
            except UserError as error:
                found.add("entries", f"{place}: image {error}")
                continue
            if picture is not None:
                yield picture

    def _picture(self, element: Element, place: str, found: FindingCollector) -> Picture | None:
        """None where the size of the image cannot be known."""
        name = element.attributes.get("name")
        if not name:
            raise UserError("has no name")
        subset = element.attributes.get("subset", "")
        folders = [self.image_root]
        if self.image_root == self._file.parent:
            places = [self.image_root / "images"]
            if subset and "/" not in subset and subset != "..":
                places.insert(0, places[0] / subset)
            folders = [*(p for p in places if p.is_dir()), self.image_root]
        file_name = locate(name, self.image_root, folders)
        sides = [to_side(element.attributes.get(side), side) for side in ("width", "height")]
        if not all(sides):
            size = size_of(file_name, self.image_root, place, found)
            if size is None:
                return None
            sides = [*size]
        boxes = []
        for shape in element.children:
            try:
                box = _box(shape, f"{self._file.name}, line {shape.line}", found)
            except UserError as error:
                text = f"{self._file.name}, line {shape.line}: {shown(shape.name)} {error}"
                found.add("entries", text)
                continue
            if box is not None:
                boxes.append(box)
        return Picture(file_name, sides[0], sides[1], tuple(boxes), place, split_name(subset))


def _box(shape: Element, place: str, found: FindingCollector) -> Box | None:
    """Of a shape; None for one that has no box, or is none.

    Raises:
        UserError: what is wrong with it.
    """
    if shape.name == "tag":
        return None
    if shape.name not in ("box", "polygon", "ellipse", "mask"):
        found.add("shapes", f"{place}: {shown(shape.name)}")
        return None
    label = shape.attributes.get("label")
    if not label:
        raise UserError("has no label")

    def numbers(*names: str) -> list[float]:
        return [to_number(shape.attributes.get(name), name) for name in names]

    polygons: tuple[tuple[float, ...], ...] = ()
    degrees = to_number(shape.attributes.get("rotation", "0"), "rotation")
    corners: Sequence[float]
    if shape.name == "box":
        corners = numbers("xtl", "ytl", "xbr", "ybr")
    elif shape.name == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        corners = (x - rx, y - ry, x + rx, y + ry)
    elif shape.name == "mask":
        x, y, width, height = numbers("left", "top", "width", "height")
        corners = (x, y, x + width, y + height)
    else:
        texts = shape.attributes.get("points", "").split(";")
        points = points_of([text.split(",") for text in texts], "points")
        corners = corners_around(points)
        polygons = (tuple(v for point in points for v in point),) if len(points) > 2 else ()
    if degrees % 360 and shape.name in ("box", "ellipse"):
        x0, y0, x1, y1 = corners
        corners = corners_around(turned(corners, degrees, ((x0 + x1) / 2, (y0 + y1) / 2)))
        found.add("rotated", f"{place}: {shown(label)}, by {degrees:g} degrees")
    x0, y0, x1, y1 = corners
    return Box(label, (x0, y0, x1, y1), place, polygons)


_SUBSETS = {"train": "Train", "val": "Validation", "test": "Test"}


def write(
    folder: Path,
    parts: Mapping[str | None, Sequence[Written]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """annotations.xml; see :func:`.conversion.convert`. Crowds are left out.

    Raises:
        UserError: the name of a class or image cannot be written.
    """
    names = [c["name"] for c in categories]
    check_names(names, TITLE)
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations>", "  <version>1.1</version>"]
    lines += ["  <meta><task><labels>"]
    lines += [f"    <label><name>{escape(name)}</name></label>" for name in names]
    lines += ["  </labels></task></meta>"]
    number = 0
    for split, pictures in parts.items():
        check_names([written.picture.file_name for written in pictures], TITLE)
        subset = f' subset="{_SUBSETS[split]}"' if split else ""
        for written in pictures:
            picture = written.picture
            lines.append(
                f'  <image id="{number}" name={quoteattr(picture.file_name)}{subset} '
                f'width="{picture.width}" height="{picture.height}">'
            )
            lines += [f"    {_shape(box)}" for box in picture.boxes if not box.is_crowd]
            lines.append("  </image>")
            number += 1
    text = "\n".join([*lines, "</annotations>", ""])
    write_new(folder / _NAME, text)


def image_place(split: str | None) -> str:
    """Folder of the images of a split."""
    return f"images/{_SUBSETS[split]}" if split else "images"


def _shape(box: Box) -> str:
    label = f'label={quoteattr(box.label)} source="manual" occluded="0" z_order="0"'
    names = ("xtl", "ytl", "xbr", "ybr")
    corners = " ".join(f'{n}="{plain_number(v)}"' for n, v in zip(names, box.corners))
    return f"<box {label} {corners}></box>"
