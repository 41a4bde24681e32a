"""COCO-format documents as files: reading them in any Unicode encoding, and repaired copies."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..durable import private_folder, write_text
from ..errors import UserError

__all__ = ["KEPT_KEYS", "TextDocument", "collector_paused", "read_document", "write_copy"]

KEPT_KEYS = ["id"]
"""Of annotations, besides those that Detectron2 keeps: by the id people find them in their file."""
_STEM = 100  # letters of a name


class TextDocument(NamedTuple):
    """A JSON file."""

    content: Any
    encoding: str
    """As Python names it: "utf-8-sig" is UTF-8 with a byte order mark."""


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's cyclic collector, which takes half of the time of reading a large data set.

    It looks at millions of small objects again and again, none of which is in a cycle.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_document(path: Path) -> TextDocument:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        UserError: it is no JSON.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    encoding = json.detect_encoding(data)
    try:
        content = json.loads(data)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read as JSON: it is no text in Unicode ({error}). Save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # also of the encoding
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return TextDocument(content, encoding)


def write_copy(document: Any, stem: str) -> Path:
    """Write a document into the cache as a whole or not at all; several processes may do the same.

    Args:
        document: what ``json`` can write.
        stem: what the file's name begins with, shortened and in plain letters; the rest says what
            is in it. Nobody else can write to its folder, as what is there has been judged.

    Raises:
        OSError: no cache folder can be written.
    """
    text = json.dumps(document)
    # A name may have 255 bytes, and must not lead out of the folder.
    begin = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in stem)
    name = f"{begin[:_STEM]}-{hashlib.sha1(text.encode()).hexdigest()[:16]}.json"
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    tried = []
    for folder in (
        Path("~/.cache/detection_toolkit/annotations").expanduser(),
        Path(tempfile.gettempdir(), f"detection_toolkit-annotations-{user}"),
    ):
        try:
            write_text(private_folder(folder) / name, text)
            return folder / name
        except OSError as error:
            tried.append(f"{folder} ({error})")
    raise OSError(f"no cache folder can be written: {'; '.join(tried)}")
