"""All that is wrong with a COCO-format data set, before anything is trained on it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UserError
from .datasets import is_number, register_coco_json
from .files import check_file_name, find_escapes
from .images import EXIF_ORIENTATION, MAX_PIXELS, UnreadableImageError, read_image, shown_name

__all__ = ["DatasetReport", "Finding", "inspect_dataset"]

# Sides of boxes in pixels, and shares of the image's area, that are worth a look.
TINY_SIDE = 4.0
GIANT_SHARE = 0.95
_TOLERANCE = 0.01  # pixels outside that are the rounding of a tool
_NAMED = 5  # examples of a finding


@dataclass
class Finding:
    """One kind of thing that was found."""

    title: str
    outcome: str
    """What training does about it."""
    is_harmful: bool
    """Whether it stops training, or leaves it less than it should have."""
    count: int = 0
    examples: list[str] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    """Ids of images that show it, each once."""

    def add(self, example: str, image_id: Any = None) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < _NAMED:
            self.examples.append(example)
        if image_id is not None and image_id not in self.images[-1:]:
            self.images.append(image_id)


# In the order of a report. True: exit code 1.
_KINDS: dict[str, tuple[str, str, bool]] = {
    "format": ("not COCO format", "is refused", True),
    "image_id": ("image ids that repeat", "is refused", True),
    "category_id": ("category ids or names that repeat", "is refused", True),
    "annotation_id": ("annotation ids that repeat", "is refused", True),
    "unknown_image": ("annotations of images that are not listed", "is refused", True),
    "unknown_category": ("annotations of categories that are not listed", "is refused", True),
    "outside_root": ("file names that lead out of the image folder", "is refused", True),
    "no_objects": ("no object at all", "is refused", True),
    "missing": ("images that do not exist", "stops, or skips them on request", True),
    "unreadable": ("images that cannot be read", "stops, or skips them on request", True),
    "size": ("images of another size than the JSON says", "stops", True),
    "exif_size": (
        "images whose size in the JSON is that before the rotation in EXIF",
        "stops: the boxes would be those of the picture lying on its side",
        True,
    ),
    "crowded": ("images with more objects than queries", "never matches some objects", True),
    "same_file": ("files that several images name", "sees them more often than others", False),
    "exif": ("images that EXIF rotates", "rotates them, as the JSON expects", False),
    "degenerate": ("boxes without area, or not finite", "drops them", False),
    "outside": ("boxes outside of their image", "drops them", False),
    "clipped": ("boxes that reach out of their image", "clips them", False),
    "tiny": (f"boxes with a side below {TINY_SIDE:g} pixels", "uses them", False),
    "giant": (f"boxes of more than {GIANT_SHARE:.0%} of their image", "uses them", False),
    "repeated": ("boxes that repeat, class and all", "matches each to a query of its own", False),
    "empty": ("images without objects", "leaves them out, unless filter_empty=false", False),
    "unused": ("categories without objects", "learns nothing of them", False),
}


@dataclass
class DatasetReport:
    """What :func:`inspect_dataset` has found."""

    num_images: int = 0
    num_boxes: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    """Boxes of every category, crowds included."""
    most_objects: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    images: dict[Any, dict[str, Any]] = field(default_factory=dict)
    """The JSON's images by their id, with "annotations" and, where it fits, "path"."""

    def add(self, kind: str, example: str, image_id: Any = None) -> None:
        """Count a finding; ``kind`` is one of the keys of ``findings``."""
        if kind not in self.findings:
            self.findings[kind] = Finding(*_KINDS[kind])
        self.findings[kind].add(example, image_id)

    @property
    def is_harmful(self) -> bool:
        """Whether training would stop, or be less than it should be."""
        return any(finding.is_harmful for finding in self.findings.values())

    def in_order(self) -> Iterator[tuple[str, Finding]]:
        """Kinds and findings, those that do harm first."""
        for kind in _KINDS:
            if kind in self.findings:
                yield kind, self.findings[kind]


def inspect_dataset(
    json_file: str | Path,
    image_root: str | Path,
    *,
    num_queries: int | None = None,
    allow_outside: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> DatasetReport:
    """Look at every entry and decode every image.

    Args:
        json_file: the annotations.
        image_root: folder that its file names are relative to.
        num_queries: of the detector; None: no limit to the objects of an image.
        allow_outside, max_pixels: as for training.
        workers: threads that decode; default: one a core.
        progress: wraps an iterable of a known length, to show how far it is.

    Raises:
        FileNotFoundError: JSON or folder do not exist.
        ValueError: the file is no JSON.
    """
    path, root = Path(json_file).expanduser(), Path(image_root).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    report = DatasetReport()
    if not isinstance(document, dict):
        report.add("format", "the top level is not an object")
        return report
    entries = {key: _entries(report, document, key) for key in _REQUIRED}
    names = _look_at_categories(report, entries["categories"])
    _look_at_images(report, entries["images"], root, allow_outside=allow_outside)
    _look_at_annotations(report, entries["annotations"], names)
    for image_id, image in report.images.items():
        _look_at_objects(report, image_id, image, num_queries)
    _look_at_files(report, max_pixels, workers, progress or (lambda items, total: items))
    _ask_training(report, path, root, allow_outside=allow_outside)
    return report


_REQUIRED = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def _entries(report: DatasetReport, document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The entries of a list that have all keys; the others are noted."""
    entries = document.get(key)
    if not isinstance(entries, list) or not entries:
        report.add("format", f"there is no list {key!r}, or an empty one")
        return []
    good = []
    for entry in entries:
        if not isinstance(entry, dict):
            report.add("format", f"{key}: {_short(entry)} is not an object")
            continue
        absent = [k for k in _REQUIRED[key] if k not in entry]
        if absent:
            report.add("format", f"{key}: {_short(entry)} has no {', '.join(map(repr, absent))}")
        elif any(isinstance(entry[k], (list, dict)) for k in _REQUIRED[key] if k != "bbox"):
            report.add("format", f"{key}: {_short(entry)} has a list where a value belongs")
        else:
            good.append(entry)
    return good


def _look_at_categories(report: DatasetReport, categories: list[dict[str, Any]]) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for category in categories:
        number, name = category["id"], str(category["name"])
        if number in names or name in names.values():
            report.add("category_id", f"{number!r}, {name!r}")
        names.setdefault(number, name)
    return names


def _look_at_images(
    report: DatasetReport, images: list[dict[str, Any]], root: Path, *, allow_outside: bool
) -> None:
    files: Counter = Counter()
    for image in images:
        number, name = image["id"], image["file_name"]
        if number in report.images:
            report.add("image_id", f"{number!r} ({_short(name)})")
            continue
        image = {**image, "annotations": []}
        report.images[number] = image
        if not isinstance(name, str) or not all(_is_size(image[k]) for k in ("height", "width")):
            report.add(
                "format",
                f"image {number!r}: file_name {_short(name)}, height "
                f"{_short(image['height'])}, width {_short(image['width'])}",
            )
            continue
        wrong = check_file_name(name, allow_outside=allow_outside)
        if wrong:
            report.add("outside_root", f"image {number!r}: {ascii(name)} {wrong}")
            continue
        image["path"] = str(root / name)
        files[image["path"]] += 1
    if not allow_outside:
        paths = {image["path"]: i for i, image in report.images.items() if "path" in image}
        for path in find_escapes(root, paths):
            report.add("outside_root", f"{shown_name(path)} is a link", paths[path])
            del report.images[paths[path]]["path"]
    for path, count in files.items():
        if count > 1:
            report.add("same_file", f"{shown_name(path)} ({count} times)")
    report.num_images = len(report.images)


def _look_at_annotations(
    report: DatasetReport, annotations: list[dict[str, Any]], names: dict[Any, str]
) -> None:
    counts: Counter = Counter()
    seen: set[Any] = set()
    for annotation in annotations:
        number = annotation["id"]
        if number in seen:
            report.add("annotation_id", repr(number), annotation["image_id"])
        seen.add(number)
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            report.add("format", f"annotation {number!r}: bbox {_short(box)}")
            continue
        if annotation["category_id"] not in names:
            report.add("unknown_category", f"annotation {number!r}: {annotation['category_id']!r}")
            continue
        if annotation["image_id"] not in report.images:
            report.add("unknown_image", f"annotation {number!r}: {annotation['image_id']!r}")
            continue
        counts[annotation["category_id"]] += 1
        report.num_boxes += 1
        report.images[annotation["image_id"]]["annotations"].append(annotation)
    for number, name in names.items():
        report.classes[name] = counts[number]
        if not counts[number]:
            report.add("unused", repr(name))
    if not report.num_boxes:
        report.add("no_objects", "nothing could be learnt")


def _look_at_objects(
    report: DatasetReport, image_id: Any, image: dict[str, Any], num_queries: int | None
) -> None:
    width, height = image["width"], image["height"]
    if not (_is_size(width) and _is_size(height)):
        return
    seen: set[tuple] = set()
    objects = 0
    for annotation in image["annotations"]:
        x, y, w, h = map(float, annotation["bbox"])
        text = f"annotation {annotation['id']!r} of image {image_id!r}: {annotation['bbox']}"
        if not all(map(math.isfinite, (x, y, x + w, y + h))) or w <= 0 or h <= 0:
            report.add("degenerate", text, image_id)
            continue
        inside = min(x + w, width) - max(x, 0.0), min(y + h, height) - max(y, 0.0)
        if min(inside) <= 0:
            report.add("outside", text, image_id)
            continue
        if w - inside[0] > _TOLERANCE or h - inside[1] > _TOLERANCE:
            report.add("clipped", text, image_id)
        if annotation.get("iscrowd"):
            continue
        objects += 1
        if min(inside) < TINY_SIDE:
            report.add("tiny", text, image_id)
        elif inside[0] * inside[1] > GIANT_SHARE * width * height:
            report.add("giant", text, image_id)
        key = (annotation["category_id"], x, y, w, h)
        if key in seen:
            report.add("repeated", text, image_id)
        seen.add(key)
    report.most_objects = max(report.most_objects, objects)
    if not objects:
        report.add("empty", shown_name(str(image["file_name"])), image_id)
    if num_queries is not None and objects > num_queries:
        name = shown_name(str(image["file_name"]))
        report.add("crowded", f"{name}: {objects} objects, {num_queries} queries", image_id)


def _look_at_files(
    report: DatasetReport,
    max_pixels: int,
    workers: int | None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> None:
    """Decode every image; Pillow and its decoders let other threads work meanwhile."""
    images = [(i, image) for i, image in report.images.items() if "path" in image]

    def look(item: tuple[Any, dict[str, Any]]) -> tuple[Any, str, str] | None:
        image_id, image = item
        found = _look_at_file(image, max_pixels)
        return (image_id, *found) if found else None

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for found in progress(pool.map(look, images), len(images)):
            if found:
                image_id, kind, text = found
                report.add(kind, text, image_id)


def _look_at_file(image: dict[str, Any], max_pixels: int) -> tuple[str, str] | None:
    path = image["path"]
    if not os.path.isfile(path):
        return "missing", shown_name(path)
    try:
        height, width = read_image(path, max_pixels=max_pixels).shape[:2]
    except UnreadableImageError as error:
        return "unreadable", str(error)
    stated = (image["height"], image["width"])
    orientation = _orientation(path)
    text = f"{shown_name(path)} is {width}x{height}, the JSON says {stated[1]}x{stated[0]}"
    if stated != (height, width):
        is_turned = orientation in (5, 6, 7, 8) and stated == (width, height)
        return ("exif_size" if is_turned else "size"), text
    if orientation not in (None, 1):
        return "exif", shown_name(path)
    return None


def _orientation(path: str) -> int | None:
    try:
        with PathManager.open(path, "rb") as file:
            return Image.open(file).getexif().get(EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data, of a picture that can be read all the same
        return None


def _ask_training(report: DatasetReport, path: Path, root: Path, *, allow_outside: bool) -> None:
    """Whatever this module does not know of, training may still refuse."""
    if any(_KINDS[kind][1] == "is refused" for kind in report.findings):
        return
    try:
        # A name of its own, so that a file that was mended meanwhile is read again.
        name = f"inspected:{path}:{root}:{path.stat().st_mtime_ns}"
        register_coco_json(str(path), str(root), name=name, allow_outside=allow_outside)
    except ValueError as error:
        report.add("format", str(error))
    except FileNotFoundError as error:
        if "missing" not in report.findings:
            report.add("missing", str(error))


def _is_size(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and value >= 1


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
