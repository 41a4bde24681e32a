"""A page with many pictures: one HTML file without any other, of a size that a browser opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..durable import write_text
from ..texts import printable
from . import report_charts as charts

__all__ = ["ContactPage"]

_MOST_BYTES = 20_000_000  # of all pictures
_MOST_OF_ONE = 300_000
_LEAST_OF_ONE = 10_000  # of which something can be seen


class ContactPage:
    """Collects pictures with their captions, and writes the page.

    A picture is held as it is embedded, so many of them need no memory to speak of. Together they
    have 20 MB at most: of more pictures each one is smaller, and of too many the first ones are
    shown.
    """

    def __init__(self, title: str, count: int, introduction: str = ""):
        """
        Args:
            title: of the page.
            count: pictures that will come.
            introduction: a paragraph below the title.
        """
        self._title = printable(title)
        self._most = max(_LEAST_OF_ONE, min(_MOST_OF_ONE, _MOST_BYTES // max(count, 1)))
        self._room = _MOST_BYTES // self._most
        self._introduction = introduction
        self._sections: list[tuple[str, list[charts.Part]]] = []
        self._left_out = 0

    def begin_section(self, heading: str) -> None:
        """What is added from now on stands below a heading."""
        self._sections.append((printable(heading), []))

    def add(
        self, picture: np.ndarray, title: str, words: str = "", *, is_wide: bool = False
    ) -> None:
        """
        Args:
            picture: (H, W, 3) uint8 in RGB.
            title, words: the caption, which may be of strangers: it is escaped.
            is_wide: it takes the width of the page; others stand side by side where there is room.
        """
        if not self._room:
            self._left_out += 1
            return
        self._room -= 1
        cell: list[charts.Part] = [
            ("heading", printable(title)),
            ("image", charts.embed_picture(picture, most_bytes=self._most)),
        ]
        if words:
            cell.append(("text", printable(words)))
        if not self._sections:
            self.begin_section("Pictures")
        parts = self._sections[-1][1]
        if is_wide:
            parts.extend(cell)
        elif parts and parts[-1][0] == "row":
            parts[-1][1].append(cell)
        else:
            parts.append(("row", [cell]))

    def write(self, path: str | Path) -> str:
        """Write the page, completely or not at all; returns the path."""
        sections = [(heading, parts) for heading, parts in self._sections if parts]
        for _, parts in sections:
            for kind, cells in parts:
                if kind == "row" and len(cells) % 2:
                    cells.append([])  # the last picture is as large as the others
        if self._left_out:
            text = f"{self._left_out} more pictures are in the folder of this page."
            sections.append(("Not shown", [("text", text)]))
        page = charts.render_page(self._title, sections, introduction=printable(self._introduction))
        write_text(path, page)
        return str(path)
