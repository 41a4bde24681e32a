"""What the readers of all formats make: pictures with boxes, and COCO-format documents of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError
from ...texts import shown
from ..findings import FindingCollector, raise_harm
from ..judgement import Judgement, judge

__all__ = [
    "Box",
    "DataSource",
    "Part",
    "Picture",
    "RecordSource",
    "images_of",
    "is_image_id",
    "subset",
]

# Hundredths of a pixel, as COCO's own files have: what shares of the image are worth.
_DECIMALS = 2


class Box(NamedTuple):
    """An object of a picture."""

    label: str
    """Name of its class."""
    corners: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels from the left upper corner of the picture."""
    place: str
    """The file that it is from, and the line."""
    polygons: tuple[tuple[float, ...], ...] = ()
    """x, y, x, y, ... in pixels."""
    is_crowd: bool = False
    """Neither to be found nor a mistake where it is."""


class Picture(NamedTuple):
    """An image file and its objects."""

    file_name: str
    """Relative to the image folder, with / between folders."""
    width: int
    height: int
    boxes: tuple[Box, ...]
    place: str
    """The file that names it, and the line."""
    split: str | None = None
    """The part of the data set that it belongs to, where the format says so."""


class Part(NamedTuple):
    """A data set, or one of its splits, as a COCO-format document that is to be judged."""

    document: dict[str, Any]
    image_root: Path
    """Folder that the file names are relative to."""
    found: FindingCollector
    """What the reader has found already, and where the annotations are from."""
    json_file: Path | None = None
    """That holds just this document."""
    encoding: str = "utf-8"
    """Of that file."""

    def judge(self, *, allow_outside: bool = False, num_queries: int | None = None) -> Judgement:
        """:func:`.judgement.judge`, with what the reader has found."""
        return judge(
            self.document,
            str(self.image_root),
            encoding=self.encoding,
            allow_outside=allow_outside,
            num_queries=num_queries,
            found=self.found,
        )


class DataSource(ABC):
    """A data set in one of the formats."""

    format: str
    """A name of ``FORMATS``."""
    path: Path
    image_root: Path
    splits: tuple[str, ...]
    """Of "train", "val" and "test" those that the data set has; none where it is undivided."""
    evidence: str
    """By which the format was recognised."""

    @abstractmethod
    def read(self, split: str | None) -> Part:
        """One of the splits, or all images.

        Raises:
            UserError: a file cannot be read at all. What is wrong with an entry is a finding.
        """


class RecordSource(DataSource):
    """A format whose reader yields pictures."""

    @abstractmethod
    def pictures(self, split: str | None, found: FindingCollector) -> Iterator[Picture]:
        """Those of a split, or all of them, in an order that is always the same.

        Args:
            split: one of ``splits``; others than its pictures may be yielded as well.
            found: is told what is wrong with entries.
        """

    def class_names(self) -> Sequence[str] | None:
        """In the order of their ids; None where only the objects have them."""
        return None

    def read(self, split: str | None) -> Part:
        found = FindingCollector()
        names = self.class_names()
        # Classes that no table lists are those of all splits: else these would differ.
        pictures = list(self.pictures(split if names is not None else None, found))
        if names is None:
            names = sorted({box.label for picture in pictures for box in picture.boxes})
        if split is not None:
            pictures = [p for p in pictures if p.split == split]
        if not pictures:
            raise_harm(found.findings(), str(self.path))
            of_split = "" if split is None else f" of its split {split}"
            raise UserError(f"{self.path}: there are no images{of_split}")
        return Part(make_document(pictures, names, found), self.image_root, found)


def make_document(
    pictures: Sequence[Picture], names: Sequence[str], found: FindingCollector
) -> dict[str, Any]:
    """A COCO-format document; ``found`` learns where its annotations are from.

    Args:
        pictures: in the order of the image ids, which begin with 1.
        names: of the classes, whose ids begin with 1, too.
        found: is also told of boxes of other classes.
    """
    numbers = {name: number for number, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, picture in enumerate(pictures, start=1):
        images.append(
            {
                "id": image_id,
                "file_name": picture.file_name,
                "width": picture.width,
                "height": picture.height,
            }
        )
        found.image_places[image_id] = picture.place
        for box in picture.boxes:
            if box.label not in numbers:
                listed = ", ".join(map(shown, names[:8])) + (", ..." if len(names) > 8 else "")
                text = f"{box.place}: the class {shown(box.label)} is not among the names: {listed}"
                found.add("entries", text, image_id)
                continue
            number = len(annotations) + 1
            annotations.append(_annotation(box, number, image_id, numbers[box.label]))
            found.places[number] = box.place
    return {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }


def _annotation(box: Box, number: int, image_id: int, category_id: int) -> dict[str, Any]:
    x0, y0, x1, y1 = (round(float(v), _DECIMALS) for v in box.corners)
    width, height = round(x1 - x0, _DECIMALS), round(y1 - y0, _DECIMALS)
    polygons = [[round(float(v), _DECIMALS) for v in polygon] for polygon in box.polygons]
    area = round(sum(map(_polygon_area, polygons)), _DECIMALS)
    annotation = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x0, y0, width, height],
        "area": area if 0 < area < math.inf else round(width * height, 2 * _DECIMALS),
        "iscrowd": int(box.is_crowd),
    }
    if polygons:
        annotation["segmentation"] = polygons
    return annotation


def _polygon_area(polygon: Sequence[float]) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    ends = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]])
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in ends)) / 2


def images_of(part: Part) -> list[Any]:
    """Entries of the document.

    Raises:
        UserError: it has none.
    """
    images = part.document.get("images") if isinstance(part.document, dict) else None
    if not isinstance(images, list):
        title = part.json_file or "the data set"
        raise UserError(f"{title}: not in COCO format: it has no list 'images'")
    return images


def is_image_id(value: Any) -> bool:
    """Whether entries can be found by it."""
    return isinstance(value, (int, float, str))


def _is_of(entry: Any, key: str, image_ids: set[Any]) -> bool:
    number = entry.get(key) if isinstance(entry, dict) else None
    return not is_image_id(number) or number in image_ids


def subset(part: Part, image_ids: set[Any]) -> Part:
    """Some of the images of a part, with their annotations and all categories.

    Entries that are at fault stay: whoever judges the document names them.
    """
    lists = {"images": [i for i in images_of(part) if _is_of(i, "id", image_ids)]}
    annotations = part.document.get("annotations")
    if isinstance(annotations, list):
        lists["annotations"] = [a for a in annotations if _is_of(a, "image_id", image_ids)]
    document = {**part.document, **lists}
    return part._replace(document=document, found=part.found.copy(), json_file=None)
