"""XML of strangers: a tree with the line of every element, and none of what XML can do besides.

Entities are refused: a file of a kilobyte can define one that is a gigabyte, or that is another
file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from ...errors import UserError
from ...texts import shown
from .text_files import check_inside

__all__ = ["Element", "read_xml"]


@dataclass
class Element:
    """An element of an XML file."""

    name: str
    attributes: dict[str, str]
    line: int
    children: list[Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Between its tags, without spaces around it."""
        return "".join(self.texts).strip()

    def all(self, name: str) -> Iterator[Element]:
        """Its children of a name."""
        return (child for child in self.children if child.name == name)

    def first(self, *names: str) -> Element | None:
        """The first of its children of a name, or of that of that name in it, and so on."""
        found: Element | None = self
        for name in names:
            found = None if found is None else next(found.all(name), None)
        return found

    def text_of(self, *names: str) -> str | None:
        """Of :meth:`first`; None where there is none, or nothing in it."""
        found = self.first(*names)
        return None if found is None else found.text or None


def read_xml(path: Path, root_folder: Path | None = None) -> Element:
    """The root of an XML file.

    Args:
        path: of the file.
        root_folder: see :func:`.text_files.check_inside`.

    Raises:
        UserError: it is no XML, defines entities, or leads out of the root folder.
        OSError: it cannot be read.
    """
    check_inside(path, root_folder)
    root: list[Element] = []
    open_elements: list[Element] = []
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(name: str, attributes: dict[str, str]) -> None:
        element = Element(name, attributes, parser.CurrentLineNumber)
        (open_elements[-1].children if open_elements else root).append(element)
        open_elements.append(element)

    def end(name: str) -> None:
        open_elements.pop()

    def text(data: str) -> None:
        if open_elements:
            open_elements[-1].texts.append(data)

    def refuse(*_: object) -> None:
        raise UserError(
            f"{shown(path)}, line {parser.CurrentLineNumber}: it defines entities, which no "
            "annotations need: it is not read"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = refuse
    parser.UnparsedEntityDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise UserError(f"{shown(path)} cannot be read as XML: {error}") from error
    except (ValueError, LookupError) as error:  # an encoding that nobody knows
        if isinstance(error, UserError):
            raise
        raise UserError(f"{shown(path)} cannot be read as XML: {error}") from error
    return root[0]
