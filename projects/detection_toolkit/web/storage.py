"""The files that the page takes and draws, kept for a while and within a size."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import NamedTuple

__all__ = ["UploadFolder"]

MAX_AGE = 1800.0
"""Seconds that a file is kept."""
BROKEN_AFTER = 120.0
"""Seconds without a byte, after which an upload has been broken off. The guard waits less."""
MAX_BYTES = 2**30
"""Of all files together."""
_NEEDED = 60.0  # seconds: somebody has just uploaded it, or is about to look at it
_LEAST = 2**16  # bytes that a file counts at least, so that many small ones are few, too


class _File(NamedTuple):
    modified: float
    size: int
    path: str


class UploadFolder:
    """The page's folder. What is in it at first, the examples, stays."""

    def __init__(self, path: str | os.PathLike[str]):
        """
        Args:
            path: of the folder, which need not be there yet.
        """
        self._path = os.path.abspath(path)
        self._kept = {file.path for file in self._files()}
        self._reserved = 0
        self._lock = threading.Lock()

    def owns(self, path: str) -> bool:
        """Whether a path, as somebody writes it, leads to something in the folder."""
        if "\0" in path or not os.path.isabs(path):
            return False
        normal = os.path.normcase(os.path.normpath(path))
        return normal.startswith(os.path.normcase(self._path) + os.sep)

    def reserve(self, size: int) -> bool:
        """Make place for an upload of up to so many bytes; False if there is none."""
        with self._lock:
            if self._sweep(size) + self._reserved + size > MAX_BYTES:
                return False
            self._reserved += size
            return True

    def release(self, size: int) -> None:
        """The upload has ended."""
        with self._lock:
            self._reserved -= size

    def sweep(self) -> None:
        """Delete old files, broken-off uploads, and the oldest files where all are too much."""
        with self._lock:
            self._sweep(0)

    def _sweep(self, needed: int) -> int:
        now = time.time()
        left = []
        for file in self._files():
            if file.path in self._kept:
                continue
            # Gradio writes uploads at the top, and moves them to a folder when they are complete.
            uploading = os.path.dirname(file.path) == self._path
            age = now - file.modified
            if age > MAX_AGE or (uploading and age > BROKEN_AFTER):
                self._delete(file.path)
            else:
                left.append(file)
        total = sum(file.size for file in left)
        for file in sorted(left):
            if total + self._reserved + needed <= MAX_BYTES or now - file.modified < _NEEDED:
                break
            self._delete(file.path)
            total -= file.size
        return total

    def _files(self) -> list[_File]:
        files = []
        for folder, _, names in os.walk(self._path):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    stat = os.lstat(path)
                except OSError:  # gone in the meantime
                    continue
                files.append(_File(stat.st_mtime, max(stat.st_size, _LEAST), path))
        return files

    def _delete(self, path: str) -> None:
        folder = os.path.dirname(path)
        with contextlib.suppress(OSError):
            os.unlink(path)
            if folder != self._path:
                os.rmdir(folder)  # which was made for this file, unless there are others
