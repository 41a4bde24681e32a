"""One run at a time in an output folder: two would remove and overwrite each other's checkpoints.

The lock is one of the system, on a file in the folder, and is gone with the process that holds it,
however that ends: a requeued job just takes it over. The file says who holds it. Some network disks
keep locks for each machine by itself. So the holder also touches the file while it runs, and
another machine takes over only what has not been touched for a while.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..errors import UserError
from ..texts import parse_json, shown

try:
    import fcntl
except ImportError:  # where the system has no such locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_NAME", "FolderInUseError", "check_unlocked", "locked_folder", "locked_run"]

logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"
_BEAT = 5.0  # seconds from one touch to the next
_PATIENCE = 4 * _BEAT  # without a touch, after which a holder on another machine is gone
_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: dict[str, int] = {}  # real paths of this process's folders -> how often they are locked


class FolderInUseError(UserError):
    """Another run is writing into an output folder."""


@dataclass(frozen=True)
class _Holder:
    host: str
    process: int
    since: str

    @classmethod
    def read(cls, handle: int) -> _Holder | None:
        """Who says to have the lock; None for nobody, or what is no such file."""
        try:
            values = parse_json(os.pread(handle, 4096, 0))
            return cls(str(values["host"]), int(values["process"]), str(values["since"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def __str__(self) -> str:
        return f"process {self.process} on {shown(self.host)}, since {shown(self.since)}"


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """While this lasts, no other process runs in a folder; it is made where it is not there.

    In a process that has locked it already, nothing more happens.

    Raises:
        FolderInUseError: another process does; names it and its machine.
        UserError: what stands in the lock's place is a link, or no file.
        OSError: the file of the lock cannot be written.
    """
    if "://" in os.fspath(folder) or fcntl is None:
        yield
        return
    place = os.path.realpath(folder)
    if place in _held:
        yield
        return
    Path(place).mkdir(parents=True, exist_ok=True)
    handle = _open(Path(place, LOCK_NAME))
    try:
        is_locked = _lock(handle, place)
        _held[place] = handle
        try:
            with _touched(handle) if is_locked else contextlib.nullcontext():
                yield
        finally:
            del _held[place]
            if is_locked:
                with contextlib.suppress(OSError):  # gone with its folder
                    os.ftruncate(handle, 0)  # ended, and not killed
    finally:
        os.close(handle)  # which unlocks it


@contextlib.contextmanager
def locked_run(folder: str | os.PathLike[str]) -> Iterator[None]:
    """:func:`locked_folder` for all processes of a job, in the name of the first one.

    Raises:
        FolderInUseError, OSError, UserError: see there; in the first process. The others lose it.
    """
    with locked_folder(folder) if comm.is_main_process() else contextlib.nullcontext():
        comm.synchronize()
        yield


def check_unlocked(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        FolderInUseError: a process of this machine runs in a folder.
    """
    path = Path(folder, LOCK_NAME)
    if fcntl is None or os.path.realpath(folder) in _held or not path.is_file():
        return
    handle = _open(path)
    try:
        if not _try_to_lock(handle):
            raise _in_use(folder, _Holder.read(handle))
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link: remove it") from error
        raise


def _lock(handle: int, folder: str) -> bool:
    """False where the disk has no locks.

    Raises:
        FolderInUseError: it is taken.
    """
    try:
        is_free = _try_to_lock(handle)
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): no second run may be started in it", folder, error.strerror
        )
        return False
    before = _Holder.read(handle)
    if not is_free or (before is not None and _is_alive_elsewhere(handle, before)):
        raise _in_use(folder, before)
    if before is not None:
        logger.warning("%s: the run of %s is gone, and this one takes over", folder, before)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    content = json.dumps(asdict(_Holder(socket.gethostname(), os.getpid(), since))).encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, content, 0)
    return True


def _try_to_lock(handle: int) -> bool:
    try:
        # Of the process, not of the open file: loader processes that outlive it hold nothing.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _is_alive_elsewhere(handle: int, holder: _Holder) -> bool:
    """Whether the holder, on another machine, touches its file; waits to see it."""
    if holder.host == socket.gethostname():
        return False  # this machine would know of its lock
    before = os.fstat(handle).st_mtime_ns
    logger.warning("waiting %.0f s to see whether the run of %s is gone", _PATIENCE, holder)
    # What counts are the sleeps: where this process stands still meanwhile, no time passes for it.
    step = min(0.5, _BEAT)
    for _ in range(math.ceil(_PATIENCE / step)):
        time.sleep(step)
        if os.fstat(handle).st_mtime_ns != before:
            return True
    return False


@contextlib.contextmanager
def _touched(handle: int) -> Iterator[None]:
    """While this lasts, the file is touched now and then."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(handle)

    thread = threading.Thread(target=touch, name="folder lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _in_use(folder: str | os.PathLike[str], holder: Any) -> FolderInUseError:
    who = "another process" if holder is None else str(holder)
    return FolderInUseError(
        f"{os.fspath(folder)} is the folder of a run that is not over: {who}. Wait for its end, or "
        "choose another train.output_dir"
    )
