"""Class names in any script: which font has their characters, and what is written if none has."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import chain

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from ..texts import printable

__all__ = ["DEFAULT_FONT", "drawable", "find_fonts", "use_fonts"]

logger = logging.getLogger(__name__)

DEFAULT_FONT = "DejaVu Sans"
"""matplotlib's own, which is there on every machine: Latin, Greek, Cyrillic, Arabic and more."""

# Looked at first: they have the most characters, and their strokes go with the default font's.
_PREFERRED = (
    "noto sans cjk",
    "source han sans",
    "wenquanyi",
    "microsoft yahei",
    "pingfang",
    "hiragino sans",
    "yu gothic",
    "malgun gothic",
    "droid sans fallback",
    "noto sans",
    "arial unicode",
)
_LONGEST = 200  # letters; more have no room in any picture
_warned: set[str] = set()


def _says_something(record: logging.LogRecord) -> bool:
    return "Failed to find font weight" not in record.getMessage()


# A font for Chinese that has one weight only would be mentioned once for each text.
logging.getLogger("matplotlib.font_manager").addFilter(_says_something)


def drawable(text: str) -> str:
    """The text as matplotlib can draw it: in one line, cut, and what no font has as ``\\\\u5706``.

    Dollars are escaped, as they would begin mathematics. Characters that no font has are logged
    once, with what can be done about it.
    """
    text = " ".join(
        "".join(c if unicodedata.category(c) not in ("Cc", "Cf") else " " for c in text).split()
    )
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    text = text.replace("$", r"\$")
    missing = {c for c in text if _font_of(c) is None}
    if not missing:
        return text
    if missing - _warned:
        _warned.update(missing)
        logger.warning(
            "no font on this machine has the characters %s of %r: they are written as %s in "
            "pictures. A font that is installed, such as Debian's fonts-noto-cjk or fonts-noto, is "
            "found in the next run",
            printable("".join(sorted(missing))),
            text,
            "".join(sorted(missing)).encode("unicode_escape").decode(),
        )
    return "".join(c.encode("unicode_escape").decode() if c in missing else c for c in text)


def use_fonts(figure: Figure) -> None:
    """Let all texts of a figure be drawn with fonts that have their characters."""
    texts = figure.findobj(Text)
    families = find_fonts(text.get_text() for text in texts)
    if len(families) > 1:
        for text in texts:
            text.set_fontfamily(families)


def find_fonts(texts: Iterable[str]) -> list[str]:
    """Names of the fonts that together have the characters of all texts, the default one first."""
    found = (_font_of(c) for c in sorted(set(chain.from_iterable(texts))))
    return list(dict.fromkeys([DEFAULT_FONT, *(name for name in found if name)]))


@cache
def _font_of(character: str) -> str | None:
    """The first installed font that has a character."""
    if ord(character) < 0x7F:
        return DEFAULT_FONT
    for path, name in _installed():
        if ord(character) in _characters(path):
            return name
    return None


@cache
def _installed() -> list[tuple[str, str]]:
    """(file, name) of the upright, regular fonts, the best ones first."""

    def rank(entry: font_manager.FontEntry) -> tuple[int, str]:
        name = entry.name.lower()
        place = (i for i, start in enumerate(_PREFERRED) if name.startswith(start))
        return next(place, len(_PREFERRED)), name

    entries = [
        entry
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal"
        and 300 <= font_manager.weight_dict.get(entry.weight, entry.weight) <= 500
        # It has a box for every character.
        and not entry.name.lower().startswith("last resort")
    ]
    default = font_manager.findfont(DEFAULT_FONT)
    return [(default, DEFAULT_FONT), *((e.fname, e.name) for e in sorted(entries, key=rank))]


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # damaged, or removed since matplotlib listed it
        return frozenset()
