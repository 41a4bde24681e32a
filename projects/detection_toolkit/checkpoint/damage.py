"""Whether a file of ``torch.save`` is what was written."""

from __future__ import annotations

import errno
import inspect
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import torch

__all__ = ["RUNS_CODE", "damage", "is_old_archive", "refused_part"]

RUNS_CODE = "it holds more than tensors and plain values"
"""What :func:`damage` says of a file that is whole, and would run code when it is opened."""

# What PyTorch's reader says of names that it does not look up; other errors are those of damage.
_REFUSALS = (
    "Unsupported global",
    "Unsupported class",
    "unsupported GLOBAL",
    "unrecognized function",
)


def damage(path: str | Path) -> str | None:
    """What is wrong with a file of ``torch.save``; None for nothing.

    Compares the checksums, which PyTorch itself does not look at when it loads a file, and lets
    PyTorch read all but the tensors' values.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        return "it is empty"
    if is_old_archive(path):
        return f"{RUNS_CODE} (it is a tar file, as PyTorch wrote them before 2017)"
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
        if refused := refused_part(str(error)):
            return f"{RUNS_CODE} ({refused})"
        message = str(error).partition("\n")[0]
        return f"PyTorch cannot read it ({type(error).__name__}: {message})"
    return None


def is_old_archive(path: Path) -> bool:
    """Whether a file may be one of PyTorch's tar files.

    PyTorch before 2.6 opens their pickles whatever it is told. It goes by a file's beginning, and
    Python's zipfile by its end: a file may be both. One of zeros, as a crash leaves it, is an empty
    archive, of which nothing is opened.
    """
    try:
        with tarfile.open(path) as archive:
            return archive.next() is not None
    except (tarfile.TarError, EOFError):  # the second of a packed one that ends early
        return False


def refused_part(message: str) -> str:
    """The line in which PyTorch names what it would not build; empty if that is not the matter."""
    lines = (line.strip() for line in message.splitlines())
    return next((line for line in lines if any(r in line for r in _REFUSALS)), "")


def _has_checksums() -> bool:
    # On by default; PyTorch before 2.5 cannot leave them out.
    options = getattr(torch.serialization, "get_crc32_options", None)
    return options is None or bool(options())
