"""Arguments that command lines of the project share."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ..data.images import PICTURE_SUFFIXES
from .shipped import shipped_config

__all__ = ["add_config_arguments", "add_overrides_argument", "find_pictures"]


def add_config_arguments(parser: argparse.ArgumentParser, *, has_default: bool = True) -> None:
    """Add ``--config-file``, and ``--opts`` for all that follows it.

    Args:
        has_default: the config of the shipped checkpoint takes the place of a missing
            ``--config-file``; otherwise None does, to see whether it was given.
    """
    default = shipped_config()
    parser.add_argument(
        "--config-file",
        default=default if has_default else None,
        metavar="FILE",
        help=f"config, by path or by its name among the packaged ones (default: {default})",
    )
    add_overrides_argument(
        parser, "changes to the config, e.g. train.init_checkpoint=model.pth train.device=cpu"
    )


def add_overrides_argument(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add ``--opts``, which takes all that follows it; ``purpose`` is its help."""
    parser.add_argument(
        "--opts", default=[], nargs=argparse.REMAINDER, metavar="KEY=VALUE", help=purpose
    )


def find_pictures(inputs: Sequence[str]) -> list[Path]:
    """Picture files that files, folders (not their subfolders) and globs stand for, each once.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder or glob without pictures.
    """
    files: dict[Path, None] = {}
    for given in inputs:
        path = Path(os.path.expanduser(given))
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
            if not found:
                known = " ".join(PICTURE_SUFFIXES)
                raise FileNotFoundError(f"no pictures in folder {given} ({known})")
        elif path.exists():  # before globs: a file may be called a[1].jpg
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
            found = [p for p in found if p.is_file()]
            if not found:
                raise FileNotFoundError(f"no such file: {given}")
        files.update(dict.fromkeys(found))
    return list(files)
