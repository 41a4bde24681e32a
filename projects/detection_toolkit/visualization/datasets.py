"""Pictures of a data set that was inspected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import BoxMode

from ..data.images import MAX_PIXELS, UnreadableImageError, read_image
from ..data.inspection import DatasetReport
from .pictures import contact_sheet, draw_ground_truth

__all__ = ["TILE", "draw_samples", "draw_worst", "worst_images"]

TILE = 320
_COLUMNS = 4


def draw_samples(
    report: DatasetReport, count: int = 16, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray | None:
    """A sheet of images with boxes and class names, spread evenly over those with objects.

    Where no image has a sound one, over all images.

    Args:
        report: of the data set.
        count: images at most.
        max_pixels: larger images are shown as a grey picture.

    Returns:
        RGB; None without images.
    """
    images = [i for i, image in report.images.items() if image["annotations"]]
    images = images or list(report.images)
    places = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    return _sheet(report, [(images[k], f"image {images[k]}") for k in places], max_pixels)


def draw_worst(
    report: DatasetReport, count: int = 16, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray | None:
    """A sheet of :func:`worst_images`; None where nothing is wrong with any image."""
    chosen = worst_images(report, count)
    return _sheet(report, [(i, f"{title} (image {i})") for i, title in chosen], max_pixels)


def worst_images(report: DatasetReport, count: int) -> list[tuple[Any, str]]:
    """Ids of images and what is wrong with them: one of every kind in turn, harmful ones first."""
    queues = [
        [(image, finding.message.partition(" (")[0]) for image in finding.images]
        for finding in report.findings
        if finding.images
    ]
    chosen: dict[Any, str] = {}
    while queues and len(chosen) < count:
        for queue in queues:
            while queue and queue[0][0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < count:
                image, title = queue.pop(0)
                chosen[image] = title
        queues = [queue for queue in queues if queue]
    return list(chosen.items())


def _sheet(
    report: DatasetReport, chosen: Sequence[tuple[Any, str]], max_pixels: int
) -> np.ndarray | None:
    tiles = [
        _tile(_draw_image(report.images[i], list(report.classes), max_pixels), title)
        for i, title in chosen
        if i in report.images
    ]
    if not tiles:
        return None
    return contact_sheet([tiles[i : i + _COLUMNS] for i in range(0, len(tiles), _COLUMNS)])


def _draw_image(image: dict[str, Any], classes: list[str], max_pixels: int) -> np.ndarray:
    """The image with its boxes, or a grey picture where it cannot be read."""
    try:
        picture = read_image(image.get("path", ""), max_pixels=max_pixels)
    except UnreadableImageError:
        return np.full((TILE * 3 // 4, TILE, 3), 128, np.uint8)
    # Large pictures are made small first: the boxes are drawn on what is seen.
    scale = min(1.0, 2 * TILE / max(picture.shape[:2]))
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    picture = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)
    annotations = []
    for annotation in image["annotations"]:
        box = np.array(annotation["bbox"], dtype=object).astype(np.float64) * scale
        if not (np.abs(box) <= 1e5).all():
            continue
        annotations.append(
            {
                "bbox": box.tolist(),
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": classes.index(annotation["category"]),
                "iscrowd": annotation.get("iscrowd", 0),
            }
        )
    metadata = Metadata(thing_classes=classes)
    return draw_ground_truth({"annotations": annotations}, metadata, image=picture)


def _tile(picture: np.ndarray, title: str) -> np.ndarray:
    """A picture of one width with a line of text below."""
    scale = TILE / max(picture.shape[:2])
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    strip = np.full((20, TILE, 3), 255, np.uint8)
    text = title.encode("ascii", "replace").decode()
    cv2.putText(strip, text, (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
    canvas = np.full((picture.shape[0], TILE, 3), 255, np.uint8)
    left = (TILE - picture.shape[1]) // 2
    canvas[:, left : left + picture.shape[1]] = picture
    return np.concatenate([canvas, strip])
