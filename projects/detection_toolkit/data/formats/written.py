"""What the writers of all formats are given, and what they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError
from ...texts import shown
from .records import Box, Picture

__all__ = ["Written", "check_names", "plain_number", "whole_corners"]


class Written(NamedTuple):
    """An image that is written."""

    picture: Picture
    """With the file name that it gets, relative to the format's folder of images."""
    source: Path
    """The file that it is."""
    image: Mapping[str, Any]
    """Its entry in the document."""
    annotations: Sequence[Mapping[str, Any]]
    """Those in the document, as the boxes of the picture."""
    is_referred: bool
    """It stays where it is, and its file name is relative to the image folder there."""

    def path_in(self, place: str) -> str:
        """Its name from the folder that is written, whose images are at a place."""
        name = self.picture.file_name
        return name if self.is_referred else f"{place}/{name}"


def check_names(names: Iterable[str], title: str) -> None:
    """
    Raises:
        UserError: a name would be another one when it is read again.
    """
    for name in names:
        if not name.isprintable() or name != name.strip() or not name:
            raise UserError(f"the name {shown(name)!r} cannot be written as {title}: rename it")


def plain_number(value: float) -> str:
    """Without the zeros at its end."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def whole_corners(box: Box, picture: Picture) -> tuple[int, int, int, int]:
    """The nearest whole pixels within the picture, of one pixel at least."""
    x0, y0, x1, y1 = (round(v) for v in box.corners)
    x0, y0 = min(max(x0, 0), picture.width - 1), min(max(y0, 0), picture.height - 1)
    return x0, y0, min(max(x1, x0 + 1), picture.width), min(max(y1, y0 + 1), picture.height)
