"""Suspect annotations as pictures: what is annotated beside what a detector says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances

from ..data import UnreadableImageError, read_image
from ..data.images import MAX_PIXELS
from ..data.inspection import DatasetReport
from . import report_charts as charts
from .pictures import draw_detections, draw_ground_truth, side_by_side

__all__ = ["draw_suspect", "render_suspects"]

_SIDE = 240  # pixels of the longer side of a picture
_CONTEXT = 2.5  # sides of the box that are shown of its surroundings
_LEAST = 64  # pixels of the image that are shown at least


def draw_suspect(
    finding: Mapping[str, Any],
    image: np.ndarray,
    annotations: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
) -> np.ndarray:
    """The surroundings of a suspect annotation twice: all annotations, and the detection.

    Args:
        finding: as in label_errors.json.
        image: (H, W, 3) RGB.
        annotations: of the image; "category" is a name, "bbox" x, y, width, height.
        classes: all names.

    Returns:
        (H', W', 3) RGB.
    """
    boxes = [b for key in ("annotated", "found") if (b := finding[key]["bbox"]) is not None]
    left, top, right, bottom = _window(boxes, image.shape)
    scale = _SIDE / max(right - left, bottom - top)
    size = [max(1, round(side * scale)) for side in (right - left, bottom - top)]
    crop = np.ascontiguousarray(image[top:bottom, left:right])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    crop = cv2.resize(crop, size, interpolation=way)
    metadata = Metadata(thing_classes=list(classes))

    def place(box: Sequence[float]) -> list[float]:
        x, y, width, height = map(float, box)
        return [(x - left) * scale, (y - top) * scale, width * scale, height * scale]

    record = {
        "annotations": [
            {
                "bbox": place(a["bbox"]),
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": list(classes).index(a["category"]),
                "iscrowd": a.get("iscrowd", 0),
            }
            for a in annotations
        ]
    }
    found = Instances(crop.shape[:2])
    box = finding["found"]["bbox"]
    placed = [] if box is None else [place(box)]
    found.pred_boxes = Boxes(torch.tensor(placed).reshape(-1, 4))
    found.pred_boxes.tensor[:, 2:] += found.pred_boxes.tensor[:, :2]
    found.scores = torch.full((len(placed),), float(finding["detection_score"]))
    known = [list(classes).index(finding["found"]["category"])] if placed else []
    found.pred_classes = torch.tensor(known, dtype=torch.long)
    drawn = [
        draw_ground_truth(record, metadata, image=crop, scale=1.0),
        draw_detections(crop, found, metadata, scale=1.0),
    ]
    return side_by_side(drawn, ["annotated", "model"])


def _window(boxes: Sequence[Sequence[float]], shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The part of an image around boxes: left, top, right, bottom."""
    corners = np.array(boxes, dtype=np.float64)
    corners[:, 2:] += corners[:, :2]
    low, high = corners[:, :2].min(0), corners[:, 2:].max(0)
    half = max(_LEAST, _CONTEXT * float((high - low).max())) / 2
    limit = np.array(shape[1::-1])
    middle = ((low + high) / 2).clip(0, limit)
    start = np.floor((middle - half).clip(0, limit - 1)).astype(int)
    end = np.ceil((middle + half).clip(start + 1, limit)).astype(int)
    return int(start[0]), int(start[1]), int(end[0]), int(end[1])


def render_suspects(
    findings: Sequence[Mapping[str, Any]],
    report: DatasetReport,
    *,
    title: str,
    about: Mapping[str, str],
    words: Mapping[str, str],
    count: int,
    max_pixels: int = MAX_PIXELS,
) -> str:
    """A page with the first findings; of images that cannot be read the words alone.

    Args:
        findings: as in label_errors.json, the surest first.
        report: on the data set.
        title: of the page.
        about: what was compared, see :func:`.report_charts.format_facts`.
        words: kind of a finding -> what it says.
        count: findings on the page.
        max_pixels: larger images are not drawn.
    """
    shown = findings[:count]
    cells: list[list[charts.Part]] = []
    for number, finding in enumerate(shown, start=1):
        annotated, found = finding["annotated"]["category"], finding["found"]["category"]
        heading = f"{number}. {words[finding['kind']]}"
        which = finding["annotation_id"]
        says = f"{found} {finding['detection_score']:.2f}" if found else "nothing"
        text = (
            f"{finding['file_name']}{'' if which is None else f', annotation {which}'}; score "
            f"{finding['score']:.2f}; annotated: {annotated or 'nothing'}; model: {says}"
        )
        cell: list[charts.Part] = [("heading", heading)]
        image_id = finding["image_id"]
        try:
            picture = read_image(report.images[image_id]["path"], max_pixels=max_pixels)
            annotations = report.sound_annotations(image_id)
            drawn = draw_suspect(finding, picture, annotations, list(report.classes))
            cell.append(("image", charts.embed_picture(drawn)))
        except UnreadableImageError as error:
            cell.append(("text", str(error)))
        cells.append([*cell, ("text", text)])
    rows: list[charts.Part] = [("row", cells[i : i + 2]) for i in range(0, len(cells), 2)]
    kinds = [[word, sum(f["kind"] == kind for f in findings)] for kind, word in words.items()]
    table = charts.format_table(["", "suspects"], kinds)
    note = (
        "A model is no judge: these are the annotations to look at first. The score orders them; "
        "it is no probability."
    )
    summary: list[charts.Part] = [
        ("html", charts.format_facts(about)),
        ("html", table),
        ("text", note),
    ]
    suspects = rows or [("text", "None: the model contradicts no annotation.")]
    return charts.render_page(title, [("Summary", summary), ("Suspects", suspects)])
