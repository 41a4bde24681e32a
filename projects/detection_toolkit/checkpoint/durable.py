"""Files that are there as a whole or not at all, whatever happens to process or machine."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["damage", "remove_partial_files", "write_durably"]

_PARTIAL = ".partial"


def write_durably(
    path: str | Path,
    write: Callable[[IO[bytes]], Any],
    *,
    check: Callable[[Path], str | None] | None = None,
) -> None:
    """Write a file beside its place, flush it to the disk, and only then rename it.

    Args:
        path: of the file.
        write: is given the open file.
        check: says what is wrong with the written file, or None; called before the renaming.

    Raises:
        OSError: it cannot be written, as on a full disk. What stood at its place still does.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        wrong = check(partial) if check is not None else None
        if wrong:
            raise OSError(f"{path} is not what was written: {wrong}")
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a renaming permanent; where a system cannot, its own order has to do."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_partial_files(folder: str | Path) -> None:
    """Remove what killed processes have left of :func:`write_durably` in a folder."""
    for leftover in Path(folder).glob(f".*{_PARTIAL}"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def damage(path: str | Path) -> str | None:
    """What is wrong with a file of ``torch.save``; None for nothing.

    Compares the checksums, which PyTorch itself does not look at when it loads a file, and lets
    PyTorch read all but the tensors' values.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if _has_checksums() else None
    except (
        # What damaged headers lead to.
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        struct.error,
        EOFError,
        RuntimeError,
        ValueError,
    ) as error:
        return f"it is no complete archive ({error})"
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a place before the beginning
            raise
        return f"it is no complete archive ({error})"
    if broken:
        return f"the checksum of {broken} is wrong"
    lazily = {"mmap": True} if "mmap" in inspect.signature(torch.load).parameters else {}
    try:
        torch.load(path, map_location="cpu", weights_only=True, **lazily)
    except Exception as error:  # of many kinds, as every byte may be wrong
        message = str(error).partition("\n")[0]
        return f"PyTorch cannot read it ({type(error).__name__}: {message})"
    return None


def _has_checksums() -> bool:
    # On by default; PyTorch before 2.5 cannot leave them out.
    options = getattr(torch.serialization, "get_crc32_options", None)
    return options is None or bool(options())
