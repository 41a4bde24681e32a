"""Labels of boxes that cover neither one another nor the picture's edge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from .fonts import find_fonts

__all__ = ["BoxLabel", "place_labels"]

_PADDING = 2.0  # points, around a text


@dataclass(frozen=True)
class BoxLabel:
    """What is written at a box."""

    box: Sequence[float]
    """``xyxy`` in the coordinates of the axes."""
    text: str
    """Made :func:`~detection_toolkit.visualization.fonts.drawable`."""
    style: Mapping[str, Any] = field(default_factory=dict)
    """Of :class:`matplotlib.text.Text`."""


def place_labels(
    axis: Axes,
    labels: Sequence[BoxLabel],
    *,
    size: float,
    centred: bool = False,
    taken: Sequence[Bbox] = (),
) -> list[Text | None]:
    """Write each label where there is room: at the box's lower or upper edge, without or within.

    Of the places that are free, the one that hides the least of the other boxes is taken.

    The layout of the figure has to be final, as what takes room is known only then.

    Args:
        axis: shows the picture, its y axis downwards.
        labels: most important first: where there is no room left, a label is left out.
        size: of the type, in points.
        centred: in the box's middle instead, if there is room.
        taken: areas in pixels of the canvas that are kept free, too.

    Returns:
        the texts, in the order of the labels; None for one that is left out.
    """
    figure = axis.figure
    renderer = figure.canvas.get_renderer()
    family = find_fonts(label.text for label in labels)
    limits = axis.get_window_extent(renderer)
    padding = _PADDING * figure.dpi / 72
    occupied = list(taken)
    texts: list[Text | None] = []
    boxes = [_on_canvas(axis, label.box) for label in labels]
    for i, label in enumerate(labels):
        text = axis.text(
            0,
            0,
            label.text,
            fontfamily=family,
            fontsize=size,
            ha="left",
            va="bottom",
            clip_on=True,
            **label.style,
        )
        text.set_in_layout(False)
        extent = text.get_window_extent(renderer)
        width, height = extent.width + 2 * padding, extent.height + 2 * padding
        places = [
            place
            for place in _places(boxes[i], width, height, limits, centred)
            if not any(_overlap(place, other) for other in occupied)
        ]
        others = boxes[:i] + boxes[i + 1 :]
        area = min(places, key=lambda place: _hidden(place, others), default=None)
        if area is None:
            text.remove()
            texts.append(None)
            continue
        occupied.append(area)
        corner = (area.x0 + padding, area.y0 + padding)
        text.set_position(axis.transData.inverted().transform(corner))
        texts.append(text)
    return texts


def _on_canvas(axis: Axes, box: Sequence[float]) -> Bbox:
    """An ``xyxy`` box in pixels of the canvas, y upwards."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return Bbox(np.sort(axis.transData.transform([(x0, y0), (x1, y1)]), axis=0))


def _places(box: Bbox, width: float, height: float, limits: Bbox, centred: bool) -> Iterator[Bbox]:
    """Where a text at a box can be, best first; all in pixels, y upwards."""
    visible = Bbox.intersection(box, limits)
    if visible is None:
        return
    lefts, rights = (box.x0, visible.x0), (box.x1 - width, visible.x1 - width)
    corners = []
    if centred:
        corners.append(
            ((visible.x0 + visible.x1 - width) / 2, (visible.y0 + visible.y1 - height) / 2)
        )
    else:
        for x in (max(lefts), min(rights)):
            corners += [(x, box.y0 - height), (x, box.y1)]
        for x in (max(lefts), min(rights)):
            corners += [(x, visible.y1 - height), (x, visible.y0)]
    for x, y in corners:
        place = Bbox.from_bounds(max(min(x, limits.x1 - width), limits.x0), y, width, height)
        if place.y0 >= limits.y0 - 1 and place.y1 <= limits.y1 + 1:
            yield place


def _overlap(one: Bbox, other: Bbox) -> bool:
    return (
        min(one.x1, other.x1) - max(one.x0, other.x0) > 0.5
        and min(one.y1, other.y1) - max(one.y0, other.y0) > 0.5
    )


def _hidden(place: Bbox, boxes: Sequence[Bbox]) -> float:
    """The sum of the shares of the boxes that a text would hide, in hundredths."""
    shares = 0.0
    for box in boxes:
        if _overlap(place, box):
            shared = Bbox.intersection(place, box)
            shares += shared.width * shared.height / (box.width * box.height)
    return round(shares, 2)
