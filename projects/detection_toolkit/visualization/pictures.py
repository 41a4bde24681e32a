"""Annotated pictures: Detectron2's Visualizer with one colour a class, and sheets of them.

Pictures are (H, W, 3) uint8 arrays in RGB order.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont

from ..data.images import read_image
from ..defaults import DEFAULT_SCORE_THRESHOLD
from ..durable import write_durably
from ..errors import UserError
from .fonts import DEFAULT_FONT, drawable
from .labels import BoxLabel, place_labels

__all__ = [
    "DEFAULT_SCORE_THRESHOLD",
    "class_color",
    "class_name",
    "contact_sheet",
    "distinct_names",
    "draw_detections",
    "draw_ground_truth",
    "draw_labelled_boxes",
    "save_picture",
    "select_confident",
    "side_by_side",
]

_LEGIBLE_SIDE = 480  # pixels of the longer side below which labels hide small pictures
_MARGIN = 8
_TITLE_HEIGHT = 26


def select_confident(instances: Instances, threshold: float) -> Instances:
    """The detections with a score of at least ``threshold``, on the CPU."""
    instances = instances.to("cpu")
    return instances[instances.scores >= threshold]


def draw_detections(
    image: np.ndarray,
    instances: Instances,
    metadata: Metadata | None = None,
    *,
    threshold: float = 0.0,
    scale: float | None = None,
    font_size: float | None = None,
) -> np.ndarray:
    """Draw boxes, class names and scores.

    Where labels would cover one another, only the best detections have one.

    Args:
        image: (H, W, 3) RGB.
        instances: with ``pred_boxes``, ``pred_classes`` and ``scores``, in pixels of the image;
            where they have ``track_ids``, labels begin with these.
        metadata: of the data set; its ``thing_classes`` are the names and its ``thing_colors``,
            where it has them, the colours.
        threshold: detections of lower score are left out.
        scale: enlargement of the result; by default small pictures are enlarged until labels
            are legible, and others stay as they are.
        font_size: points of the labels, at 100 dots an inch of the result; by default it grows
            with the result, from 9 on.

    Returns:
        (scale H, scale W, 3) RGB.
    """
    instances = select_confident(instances, threshold)
    classes = instances.pred_classes.tolist()
    labels = [
        f"{class_name(metadata, c)} {100 * s:.0f}%"
        for c, s in zip(classes, instances.scores.tolist())
    ]
    if instances.has("track_ids"):
        ids = instances.track_ids.tolist()
        labels = [f"#{i} {label}" if i >= 0 else label for i, label in zip(ids, labels)]
    boxes = instances.pred_boxes
    order = instances.scores.argsort(descending=True).tolist()
    return draw_labelled_boxes(
        image, boxes, classes, labels, metadata, order=order, scale=scale, font_size=font_size
    )


def draw_ground_truth(
    record: dict[str, Any],
    metadata: Metadata | None = None,
    *,
    image: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Draw the annotations of one dict in Detectron2's dataset format.

    Args:
        record: with "annotations", and "file_name" where no image is given.
        metadata: see :func:`draw_detections`.
        image: (H, W, 3) RGB; read from the file by default.
        scale: see :func:`draw_detections`.
    """
    if image is None:
        image = read_image(record["file_name"])
    annotations = record.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = [a["category_id"] for a in annotations]
    labels = [
        class_name(metadata, c) + ("|crowd" if a.get("iscrowd") else "")
        for c, a in zip(classes, annotations)
    ]
    boxes = Boxes(np.asarray(boxes, dtype="float32").reshape(-1, 4))
    return draw_labelled_boxes(image, boxes, classes, labels, metadata, scale=scale)


def draw_labelled_boxes(
    image: np.ndarray,
    boxes: Boxes,
    classes: Sequence[int],
    labels: Sequence[str],
    metadata: Metadata | None = None,
    *,
    order: Sequence[int] | None = None,
    dashed: Sequence[int] = (),
    scale: float | None = None,
    font_size: float | None = None,
) -> np.ndarray:
    """Draw N boxes, each in the colour of its class and with a label.

    Where labels would cover one another, only the most important ones are drawn.

    Args:
        image: (H, W, 3) RGB.
        boxes: in pixels of the image.
        classes, labels: of each box.
        metadata, scale, font_size: see :func:`draw_detections`.
        order: of the labels, the most important first; by default the small boxes, which need it
            most.
        dashed: which boxes have dashed frames.

    Returns:
        (scale H, scale W, 3) RGB.
    """
    if order is None:
        order = boxes.area().argsort().tolist()
    if scale is None:
        scale = max(1.0, _LEGIBLE_SIDE / max(image.shape[:2]))
    visualizer = Visualizer(image, metadata, scale=scale)
    corners = boxes.tensor.tolist()
    areas = boxes.area().tolist()
    for i in sorted(range(len(corners)), key=lambda i: -areas[i]):  # small ones on top
        # Detectron2's default is half transparent: lost on a busy background.
        visualizer.draw_box(
            corners[i],
            alpha=1.0,
            edge_color=class_color(metadata, classes[i]),
            line_style="--" if i in dashed else "-",
        )
    if font_size is None:
        font_size = max(9.0, scale * (image.shape[0] * image.shape[1]) ** 0.5 / 90)
    background = {"facecolor": "black", "alpha": 0.8, "pad": 1.5, "edgecolor": "none"}
    place_labels(
        visualizer.output.ax,
        [
            BoxLabel(
                corners[i],
                labels[i],
                {
                    "color": [0.4 + 0.6 * x for x in class_color(metadata, classes[i])],
                    "bbox": background,
                    "zorder": 10,
                },
            )
            for i in order
        ],
        size=font_size,
    )
    return visualizer.output.get_image()


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str] | None = None) -> np.ndarray:
    """Pictures in one row, with a title above each."""
    return contact_sheet([pictures], titles)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] | None = None
) -> np.ndarray:
    """A grid of pictures on white, each centred in its cell.

    Args:
        rows: pictures of each row; rows may be of different lengths.
        titles: one for each column.

    Raises:
        ValueError: no picture, or more columns than titles.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise UserError("a contact sheet needs at least one picture")
    if titles is not None and len(titles) < columns:
        raise UserError(f"{columns} columns, but {len(titles)} titles")
    widths = [max(row[c].shape[1] for row in rows if len(row) > c) for c in range(columns)]
    heights = [max((picture.shape[0] for picture in row), default=0) for row in rows]
    top = _MARGIN + (_TITLE_HEIGHT if titles else 0)
    sheet = Image.new(
        "RGB",
        (
            sum(widths) + _MARGIN * (columns + 1),
            top + sum(heights) + _MARGIN * len(rows),
        ),
        "white",
    )
    lefts = [_MARGIN + sum(widths[:c]) + _MARGIN * c for c in range(columns)]
    if titles:
        pen = ImageDraw.Draw(sheet)
        for left, width, title in zip(lefts, widths, titles):
            pen.text(
                (left + width / 2, _MARGIN + _TITLE_HEIGHT / 2 - 2),
                title,
                font=_font(15),
                fill="black",
                anchor="mm",
            )
    for row, height in zip(rows, heights):
        for left, width, picture in zip(lefts, widths, row):
            place = (
                left + (width - picture.shape[1]) // 2,
                top + (height - picture.shape[0]) // 2,
            )
            sheet.paste(Image.fromarray(picture), place)
        top += height + _MARGIN
    return np.asarray(sheet)


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names of files, numbered before the suffix where an earlier one is the same.

    Upper and lower case count as the same, as some file systems do.
    """
    distinct: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem, suffix = os.path.splitext(name)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}{suffix}"
        taken.add(name.lower())
        distinct.append(name)
    return distinct


def save_picture(picture: np.ndarray, path: str | Path) -> str:
    """Write an RGB picture in the format of its suffix; the folder is created."""
    path = Path(path)
    options = {"quality": 92} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} has no ending of a picture, as .png and .jpg are")
    image = Image.fromarray(picture)
    write_durably(path, lambda file: image.save(file, format=kind, **options))
    return str(path)


def class_name(metadata: Metadata | None, index: int) -> str:
    """As matplotlib can draw it; the number of a class without a name."""
    names = metadata.get("thing_classes", None) if metadata is not None else None
    return drawable(str(names[index])) if names is not None and index < len(names) else str(index)


def class_color(metadata: Metadata | None, index: int) -> tuple[float, float, float]:
    """RGB, 0 to 1: the data set's ``thing_colors`` where it has them."""
    colors = metadata.get("thing_colors", None) if metadata is not None else None
    if colors is not None and index < len(colors):
        return tuple(channel / 255 for channel in colors[index])
    # Multiples of the golden ratio: hues far apart from one another, for any number of classes.
    hue = (0.33 + index * 0.618034) % 1.0
    return colorsys.hsv_to_rgb(hue, 1.0, 0.9)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's own font: there on every machine, and it covers more than ASCII.
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont(DEFAULT_FONT), size)
