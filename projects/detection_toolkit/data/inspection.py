"""All that is worth knowing of a data set before anything is trained on it, its images included."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..errors import UserError
from ..texts import shown
from .datasets import check_same_classes
from .findings import Finding, FindingCollector, first_harm, in_order
from .formats import open_source, read_split
from .images import (
    EXIF_ORIENTATION,
    MAX_PIXELS,
    UnreadableImageError,
    open_file,
    open_picture,
    read_image,
)
from .judgement import Judgement, judge_file

__all__ = ["DatasetReport", "compare_splits", "inspect_data", "inspect_dataset"]

# Mean difference of the grey values of thumbnails, 0..255, below which images look the same; and
# the least that the values of one must vary for it to be told from others.
_SAME_THUMBNAIL, _LEAST_CONTRAST = 1.0, 8.0
_MOST_PAIRS = 20_000_000


@dataclass
class DatasetReport:
    """What :func:`inspect_dataset` has found."""

    findings: list[Finding]
    """Those that do harm first."""
    classes: dict[str, int]
    """Boxes of every category, crowds included, in the order of the ids."""
    num_boxes: int
    most_objects: int
    images: dict[Any, dict[str, Any]]
    """The JSON's images by their id, with "annotations" (their "category" is a name) and, where the
    file may be used, "path"."""
    digests: dict[Any, str] = field(default_factory=dict)
    """Of the content of image files, by the ids of the images."""
    thumbnails: dict[Any, np.ndarray] = field(default_factory=dict)
    """(256,) grey values of the images at 16 x 16 pixels, by their ids."""

    @property
    def num_images(self) -> int:
        """Of those that the JSON lists."""
        return len(self.images)

    @property
    def is_harmful(self) -> bool:
        """Whether training would stop, or be less than it should be."""
        return first_harm(self.findings) is not None

    def sound_annotations(self, image_id: Any) -> list[dict[str, Any]]:
        """Those of an image whose box has four finite numbers and an area."""
        return [a for a in self.images[image_id]["annotations"] if _is_sound(a.get("bbox"))]

    def finding(self, kind: str) -> Finding | None:
        """The finding of a kind."""
        return next((f for f in self.findings if f.kind == kind), None)

    @property
    def verdict(self) -> str:
        """One line: ready to train, or what to fix first."""
        harm = [f for f in self.findings if f.severity == "harm"]
        if harm:
            counts: Counter[str] = Counter()  # two kinds may have one message
            for finding in harm:
                counts[finding.message] += finding.count
            return f"To fix first: {'; '.join(f'{n} {text}' for text, n in counts.items())}."
        if any(f.severity == "repaired" for f in self.findings):
            return "Ready to train, with what is repaired in a copy."
        return "Ready to train."


def _is_sound(box: Any) -> bool:
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return False
    if not all(isinstance(x, (int, float)) and abs(x) <= 1e5 for x in box):  # NaN is not
        return False
    return box[2] > 0 and box[3] > 0


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
    """Judge the document as training does, and decode every image.

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
    judgement = judge_file(path, str(root), allow_outside=allow_outside, num_queries=num_queries)
    return _inspect(judgement, root, max_pixels, workers, progress)


def inspect_data(
    path: str | Path,
    split: str | None = None,
    *,
    format: str | None = None,
    image_root: str | Path | None = None,
    num_queries: int | None = None,
    allow_outside: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> DatasetReport:
    """:func:`inspect_dataset`, of a split of a data set in any known format.

    Args:
        path, split, format, image_root: see :func:`.registration.register_data`.
        num_queries, allow_outside, max_pixels, workers, progress: see :func:`inspect_dataset`.

    Raises:
        FileNotFoundError, UserError: see :func:`.registration.register_data`; not for what is wrong
            with single entries.
    """
    source = open_source(path, format=format, image_root=image_root, allow_outside=allow_outside)
    part = read_split(source, split)
    judgement = part.judge(allow_outside=allow_outside, num_queries=num_queries)
    return _inspect(judgement, part.image_root, max_pixels, workers, progress)


def _inspect(
    judgement: Judgement,
    root: Path,
    max_pixels: int,
    workers: int | None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None,
) -> DatasetReport:
    report = _report_of(judgement, root)
    found = FindingCollector()
    if report.finding("folder") is None:
        _look_at_files(report, found, max_pixels, workers, progress or (lambda items, total: items))
    report.findings = in_order([*judgement.findings, *found.findings()])
    return report


def compare_splits(train: DatasetReport, test: DatasetReport) -> list[Finding]:
    """What is wrong between two splits: categories that differ, images that both have.

    Images are the same where their files are, byte for byte, or where they differ by no more than
    compression or size explain.
    """
    found = FindingCollector()
    try:
        check_same_classes(list(train.classes), list(test.classes))
    except UserError as error:
        found.add("classes", str(error))
    trained = {digest: number for number, digest in train.digests.items()}
    for number, digest in test.digests.items():
        if digest in trained:
            names = [
                shown(images[i]["file_name"])
                for images, i in [(test.images, number), (train.images, trained[digest])]
            ]
            found.add("shared_images", f"{names[0]} is {names[1]} of the training set", number)
    for number, other in _find_alike(test, train).items():
        if test.digests.get(number) not in trained:
            names = [
                shown(images[i]["file_name"])
                for images, i in [(test.images, number), (train.images, other)]
            ]
            found.add(
                "shared_images", f"{names[0]} looks as {names[1]} of the training set", number
            )
    return found.findings()


def _find_alike(test: DatasetReport, train: DatasetReport) -> dict[Any, Any]:
    """Ids of test images -> that of a training image which looks the same.

    Not of images without contents, nor of data sets so large that it would take minutes.
    """
    parts = [
        {i: t for i, t in report.thumbnails.items() if t.std() >= _LEAST_CONTRAST}
        for report in (test, train)
    ]
    if not all(parts) or len(parts[0]) * len(parts[1]) > _MOST_PAIRS:
        return {}
    trained = np.stack([*parts[1].values()]).astype(np.float32)
    ids = list(parts[1])
    alike = {}
    for number, thumbnail in parts[0].items():
        distances = np.abs(trained - thumbnail).mean(1)
        nearest = int(distances.argmin())
        if distances[nearest] < _SAME_THUMBNAIL:
            alike[number] = ids[nearest]
    return alike


def _report_of(judgement: Judgement, root: Path) -> DatasetReport:
    counts: Counter = Counter()
    images = {}
    for number, image in judgement.images.items():
        annotations = [
            {**a, "category": judgement.classes[a["category_id"]]}
            for a in judgement.objects.get(number, [])
        ]
        counts.update(a["category"] for a in annotations)
        images[number] = {**image, "annotations": annotations}
        if number in judgement.file_names:
            images[number]["path"] = str(root / judgement.file_names[number])
    return DatasetReport(
        findings=judgement.findings,
        classes={name: counts[name] for name in judgement.classes.values()},
        num_boxes=sum(counts.values()),
        most_objects=judgement.most_objects,
        images=images,
    )


class _File(NamedTuple):
    """What was found of an image file."""

    image_id: Any
    digest: str | None
    thumbnail: np.ndarray | None
    problem: tuple[str, str] | None
    """Kind and text of a finding."""


def _look_at_files(
    report: DatasetReport,
    found: FindingCollector,
    max_pixels: int,
    workers: int | None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> None:
    """Decode every image; Pillow and its decoders let other threads work meanwhile."""
    images = [(i, image) for i, image in report.images.items() if "path" in image]

    def look(item: tuple[Any, dict[str, Any]]) -> _File:
        image_id, image = item
        problem, thumbnail = _look_at_file(image, max_pixels)
        return _File(image_id, _digest(image["path"]), thumbnail, problem)

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for file in progress(pool.map(look, images), len(images)):
            if file.problem:
                found.add(*file.problem, file.image_id)
            if file.digest:
                report.digests[file.image_id] = file.digest
            if file.thumbnail is not None:
                report.thumbnails[file.image_id] = file.thumbnail


def _digest(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.sha1(file.read()).hexdigest()
    except OSError:
        return None


def _look_at_file(
    image: dict[str, Any], max_pixels: int
) -> tuple[tuple[str, str] | None, np.ndarray | None]:
    """Kind and text of a finding, and a thumbnail."""
    path = image["path"]
    if not os.path.isfile(path):
        return ("missing", shown(path)), None
    try:
        picture = read_image(path, max_pixels=max_pixels)
    except UnreadableImageError as error:
        return ("unreadable", str(error)), None
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA).reshape(-1)
    height, width = picture.shape[:2]
    stated = (image["height"], image["width"])
    orientation = _orientation(path)
    text = f"{shown(path)} is {width}x{height}, the JSON says {stated[1]}x{stated[0]}"
    if stated != (height, width):
        is_turned = orientation in (5, 6, 7, 8) and stated == (width, height)
        return (("exif_size" if is_turned else "size"), text), thumbnail
    if orientation not in (None, 1):
        return ("exif", shown(path)), thumbnail
    return None, thumbnail


def _orientation(path: str) -> int | None:
    try:
        with open_file(path) as file:
            return open_picture(file).getexif().get(EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data, of a picture that can be read all the same
        return None
