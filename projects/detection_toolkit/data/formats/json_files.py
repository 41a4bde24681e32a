"""JSON files of annotation tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...texts import shown
from ..documents import read_document
from .text_files import check_inside

__all__ = ["keys_of", "list_of", "read_json", "text_of"]


def keys_of(value: Any, what: str) -> Mapping[str, Any]:
    """An object of a JSON.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, dict):
        raise UserError(f"{what} is no object with keys")
    return value


def list_of(owner: Mapping[str, Any], key: str) -> list[Any]:
    """A list of an object; empty where there is none.

    Raises:
        UserError: what is there is no list.
    """
    value = owner.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"has {key} that is no list")
    return value


def text_of(owner: Mapping[str, Any], key: str) -> str:
    """A text of an object, with something in it.

    Raises:
        UserError: there is none.
    """
    value = owner.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"has no {key}" if value in (None, "") else f"has {key} that is no text")
    return value


def read_json(path: Path, root: Path | None = None) -> Any:
    """The content of a JSON.

    Args:
        path: of the file.
        root: see :func:`.text_files.check_inside`.

    Raises:
        UserError: it is none, or leads out of the root.
        OSError: it cannot be read.
    """
    check_inside(path, root)
    if not path.is_file():
        raise UserError(f"{shown(path)} is no file")
    return read_document(path).content
