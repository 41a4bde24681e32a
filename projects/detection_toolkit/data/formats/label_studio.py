"""Label Studio: its JSON export, and the shorter JSON_MIN. Numbers are percents of the image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ...errors import UserError
from ...texts import shown
from ..findings import FindingCollector
from .coordinates import corners_around, points_of, to_number, to_side, turned
from .image_files import is_picture, locate, size_of
from .json_files import keys_of, list_of, read_json
from .records import Box, Picture, RecordSource
from .text_files import read_head

__all__ = ["TITLE", "LabelStudioSource", "find"]

TITLE = "Label Studio JSON"
_MARKS = ('"result"', '"rectanglelabels"', '"polygonlabels"', '"annotations"')
_FIRST = 100  # files that are looked into, to know the format
_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # of files that were uploaded
# "labels" are those of all shapes, where shapes and labels are two tags of the interface.
_LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")
# Results that are no shapes.
_OF_IMAGES = ("choices", "textarea", "rating", "number", "taxonomy", "datetime", "ranker")


def find(path: Path) -> str | None:
    """What speaks for the format; None for nothing."""
    file = _file(path)
    return None if file is None else f"{file.name} is a list of tasks"


def _file(path: Path) -> Path | None:
    files = sorted(path.glob("*.json"))[:_FIRST] if path.is_dir() else [path]
    return next((f for f in files if _is_export(f)), None)


def _is_export(path: Path) -> bool:
    head = read_head(path).lstrip() if path.suffix.lower() == ".json" else ""
    return head.startswith("[") and any(mark in head for mark in _MARKS)


class LabelStudioSource(RecordSource):
    """An export of Label Studio, and a folder of its images.

    Args:
        path: of the JSON, or of the folder that has it.
        image_root: of the images, where they are not in images/ or beside the JSON.
        allow_outside: links may lead out of the folder.

    Raises:
        UserError: it is no list of tasks, or a link out of the folder.
    """

    splits = ()

    def __init__(self, path: Path, image_root: Path | None = None, *, allow_outside: bool = False):
        self.path = path
        self.evidence = find(path) or ""
        self._file = _file(path) or path
        self.image_root = image_root or self._file.parent
        content = read_json(self._file, None if allow_outside or not path.is_dir() else path)
        if not isinstance(content, list):
            raise UserError(f"{self._file} is no list of tasks")
        self._tasks: list[Any] = content

    def pictures(self, split: str | None, found: FindingCollector) -> Iterator[Picture]:
        for number, task in enumerate(self._tasks, start=1):
            place = f"{self._file.name}, task {number}"
            try:
                task = keys_of(task, "it")
                if type(task.get("id")) is int:
                    place = f"{self._file.name}, task with id {task['id']}"
                picture = self._picture(task, place, found)
            except UserError as error:
                found.add("entries", f"{place}: {error}")
                continue
            if picture is not None:
                yield picture

    def _picture(
        self, task: Mapping[str, Any], place: str, found: FindingCollector
    ) -> Picture | None:
        results = _results(task, place, found)
        image = self._locate(_image(task))
        boxes: list[Box] = []
        shapes = []
        width = height = 0
        for result in results:
            value = keys_of(result.get("value", result), "value")  # JSON_MIN has no level between
            key = next((k for k in _LABELS if k in value), None)
            if key is not None and _geometry(value) is not None:
                shapes.append((value, key))
                width = width or to_side(result.get("original_width"), "original_width")
                height = height or to_side(result.get("original_height"), "original_height")
            elif result.get("type") not in _OF_IMAGES and _GEOMETRIES & {*value}:
                found.add("shapes", f"{place}: {shown(result.get('type', 'a shape'))}")
        if not (width and height):
            size = size_of(image, self.image_root, place, found)
            if size is None:
                return None
            width, height = size
        for value, key in shapes:
            boxes += _boxes(value, key, width, height, place, found)
        return Picture(image, width, height, tuple(boxes), place)

    def _locate(self, address: str) -> str:
        """The file of an address: of an upload, of local files, of a cloud's storage.

        Raises:
            UserError: it is none.
        """
        try:
            parts = urlsplit(address)
        except ValueError:
            raise UserError(f"has the picture {shown(address)}, which is no address") from None
        query = parse_qs(parts.query).get("d")
        name = unquote(query[0] if query else parts.path) or address
        name = name.lstrip("/")
        folders = [self.image_root]
        if self.image_root == self._file.parent:
            folders = [p for p in (self.image_root / "images", self.image_root) if p.is_dir()]
        found = locate(name, self.image_root, folders)
        if not (self.image_root / found).is_file():
            last = name.rpartition("/")[2]
            plain = locate(_PREFIX.sub("", last), self.image_root, folders)
            if (self.image_root / plain).is_file():
                return plain
        return found


def _results(
    task: Mapping[str, Any], place: str, found: FindingCollector
) -> list[Mapping[str, Any]]:
    """Shapes of a task: of one annotator, where several have looked at it."""
    if "annotations" not in task and "completions" not in task:  # JSON_MIN
        lists = [v for v in task.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        return [keys_of(shape, "a shape") for shapes in lists for shape in shapes]
    key = "annotations" if "annotations" in task else "completions"
    done = [keys_of(a, "an annotation") for a in list_of(task, key)]
    done = [a for a in done if not a.get("was_cancelled")]
    done.sort(key=lambda a: not a.get("ground_truth"))
    if len(done) > 1:
        found.add("annotators", f"{place}: {len(done)} annotations")
    return [keys_of(r, "a result") for r in (list_of(done[0], "result") if done else [])]


def _image(task: Mapping[str, Any]) -> str:
    """The text among the data that is the name of a picture.

    Raises:
        UserError: there is none.
    """
    data = task.get("data", task)
    texts = [v for v in keys_of(data, "data").values() if isinstance(v, str)]
    preferred = [data.get("image"), *texts]
    for text in preferred:
        if isinstance(text, str) and is_picture("x" + unquote(text.partition("?")[0])):
            return text
    for text in preferred:
        if isinstance(text, str) and is_picture("x" + unquote(text)):
            return text
    if isinstance(data.get("image"), str) and data["image"]:
        return data["image"]
    raise UserError("its data name no picture")


# Keys of shapes of any kind; without labels they are the other half of a shape that has them.
_GEOMETRIES = {"points", "rle", "keypointlabels", "brushlabels", "vertices"}


def _geometry(value: Mapping[str, Any]) -> str | None:
    """The kind of a shape; None where it has no box."""
    if "points" in value:
        return "polygon"
    if "radiusX" in value:
        return "ellipse"
    return "rectangle" if "height" in value else None


def _boxes(
    value: Mapping[str, Any],
    key: str,
    width: int,
    height: int,
    place: str,
    found: FindingCollector,
) -> Iterator[Box]:
    """One for each label of a shape.

    Raises:
        UserError: what is wrong with it.
    """
    kind = _geometry(value)
    labels = list_of(value, key)
    if not labels or not all(isinstance(label, str) and label for label in labels):
        raise UserError(f"has a {kind} without a label")
    polygons: tuple[tuple[float, ...], ...] = ()

    def pixels(name: str, side: int) -> float:
        return to_number(value.get(name), name) * side / 100

    if kind == "polygon":
        shares = points_of(value.get("points"), "points")
        points = [(x * width / 100, y * height / 100) for x, y in shares]
        if len(points) > 2:
            polygons = (tuple(v for point in points for v in point),)
        corners, centre = corners_around(points), None
    else:
        x, y = pixels("x", width), pixels("y", height)
        centre = (x, y)  # Label Studio turns rectangles about their corner
        if kind == "ellipse":
            rx, ry = pixels("radiusX", width), pixels("radiusY", height)
            corners = (x - rx, y - ry, x + rx, y + ry)
        else:
            corners = (x, y, x + pixels("width", width), y + pixels("height", height))
    degrees = to_number(value.get("rotation") or 0, "rotation")
    if degrees % 360 and centre is not None:
        corners = corners_around(turned(corners, degrees, centre))
        found.add("rotated", f"{place}: {shown(labels[0])}, by {degrees:g} degrees")
    for label in labels:
        yield Box(label, corners, place, polygons)
