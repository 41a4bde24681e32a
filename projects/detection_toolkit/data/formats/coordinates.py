"""Numbers of annotations, which are texts in some formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ...errors import UserError
from ...texts import shown

__all__ = ["corners_around", "points_of", "to_number", "to_side", "turned"]

_LONGEST = 64  # letters of a number


def to_number(value: Any, name: str) -> float:
    """A finite number.

    Raises:
        UserError: it is none; the message begins with "has".
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and len(value) <= _LONGEST):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if value is None:
        raise UserError(f"has no {name}")
    raise UserError(f"has {name} {shown(value)[:40]!r}, which is no number")


def to_side(value: Any, name: str) -> int:
    """Width or height of an image in pixels; 0 where it is not said.

    Raises:
        UserError: it is none.
    """
    if value in (None, ""):
        return 0
    number = to_number(value, name)
    if number != int(number) or not 0 <= number < 2**31:
        raise UserError(f"has {name} {shown(value)[:40]}, which is no number of pixels")
    return int(number)


def points_of(values: Any, name: str) -> list[tuple[float, float]]:
    """Points of a shape, of pairs.

    Raises:
        UserError: they are none.
    """
    if not isinstance(values, (list, tuple)) or not values:
        raise UserError(f"has no {name}")
    points = []
    for value in values:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise UserError(f"has {name} that are not pairs of x and y")
        points.append((to_number(value[0], "x"), to_number(value[1], "y")))
    return points


def corners_around(points: Iterable[Sequence[float]]) -> tuple[float, float, float, float]:
    """The upright box around points."""
    xs, ys = zip(*points)
    return min(xs), min(ys), max(xs), max(ys)


def turned(
    corners: Sequence[float], degrees: float, centre: tuple[float, float]
) -> list[tuple[float, float]]:
    """Corners of a box that is turned clockwise, as pictures have y downwards.

    Args:
        corners: x0, y0, x1, y1.
        degrees: of the turn.
        centre: that stays where it is.
    """
    x0, y0, x1, y1 = corners
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    points = []
    for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1)):
        dx, dy = x - centre[0], y - centre[1]
        points.append((centre[0] + cosine * dx - sine * dy, centre[1] + sine * dx + cosine * dy))
    return points
