"""Boxes against their images: which are of use, and which are written in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BoxFaults", "find_box_faults", "guess_layout", "numbers"]

# Less than this many pixels outside is the rounding of a tool and not worth a word.
_TOLERANCE = 0.01
# A layout is judged by no fewer boxes, nor by fewer than this share that reaches out, and by so
# much of the image's side: data with a few sloppy boxes are not accused.
_ENOUGH = 4
_REACHING_SHARE = 0.1
_REACHING_SIDE = 0.1
# Of the boxes that must fit their image in another layout.
_FITTING_SHARE = 0.99


class BoxFaults(NamedTuple):
    """(N,) bool each, of which at most one is set for a box; and the part of it that is of use."""

    not_finite: np.ndarray
    degenerate: np.ndarray
    outside: np.ndarray
    clipped: np.ndarray
    inside: np.ndarray
    """(N, 4) ``xyxy``: the part within the image, of no meaning for the first three."""

    def kind(self, index: int) -> str | None:
        """Name of the fault of a box."""
        return next((name for name in self._fields[:4] if getattr(self, name)[index]), None)

    @property
    def dropped(self) -> np.ndarray:
        """(N,) bool: nothing of it is of use."""
        return self.not_finite | self.degenerate | self.outside


def numbers(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """float64 of integers and floats; NaN for integers that no float can hold."""
    try:
        return np.array(values, dtype=np.float64).reshape(shape)
    except OverflowError:
        flat = np.array(values, dtype=object).reshape(-1)
        return np.array([_float(v) for v in flat]).reshape(shape)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("nan")


def find_box_faults(boxes: np.ndarray, sizes: np.ndarray) -> BoxFaults:
    """
    Args:
        boxes: (N, 4) ``xyxy`` in pixels.
        sizes: (N, 2) width and height of the image of each.
    """
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(boxes).all(1)
        degenerate = finite & (boxes[:, 2:] <= boxes[:, :2]).any(1)
        inside = np.concatenate(
            [np.maximum(boxes[:, :2], 0.0), np.minimum(boxes[:, 2:], sizes)], axis=1
        )
        sound = finite & ~degenerate
        outside = sound & (inside[:, 2:] <= inside[:, :2]).any(1)
        clipped = sound & ~outside & (np.abs(inside - boxes) > _TOLERANCE).any(1)
    return BoxFaults(~finite, degenerate, outside, clipped, inside)


def guess_layout(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """What the four numbers of a data set's boxes seem to be, if not x, y, width, height.

    Boxes are taken for another layout where many of them reach far out of their image to the right
    or below, and none would in that layout.

    Args:
        boxes: (N, 4) as the data set has them.
        sizes: (N, 2) width and height of the image of each.

    Returns:
        "corners" (x1, y1, x2, y2), "swapped" (y, x, height, width), "swapped_corners",
        "centres" (centre x, centre y, width, height), "normalised" (shares of the image, 0 to 1),
        or None.
    """
    usable = np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1)
    boxes, sizes = boxes[usable], sizes[usable]
    if not len(boxes):
        return None
    is_share = (np.abs(boxes) <= 1).all(1) & (sizes >= 16).all(1)
    if is_share.mean() >= _FITTING_SHARE:
        return "normalised"
    reach = boxes[:, :2] + boxes[:, 2:] - sizes
    if len(boxes) < _ENOUGH or (reach > _REACHING_SIDE * sizes).any(1).mean() < _REACHING_SHARE:
        return None
    a, b = boxes[:, :2], boxes[:, 2:]
    a_swapped, b_swapped = a[:, ::-1], b[:, ::-1]
    layouts = {
        "corners": (a, b),
        "swapped": (a_swapped, a_swapped + b_swapped),
        "swapped_corners": (a_swapped, b_swapped),
        "centres": (a - b / 2, a + b / 2),
    }
    slack = np.maximum(1.0, 0.01 * sizes)
    for name, (first, last) in layouts.items():
        fits = (first >= -slack) & (last > first) & (last <= sizes + slack)
        if fits.all(1).mean() >= _FITTING_SHARE:
            return name
    return None
