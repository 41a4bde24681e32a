"""Files that are there as a whole or not at all, and that no link leads elsewhere.

Whatever the project writes goes through this module. Someone else may be able to write in the same
folder: what has a random name and is made exclusively, and then is renamed, changes no file but the
one that is meant, whatever waits under its name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError

__all__ = [
    "make_folder",
    "open_log",
    "private_folder",
    "refuse_links",
    "remove_links",
    "remove_partial_files",
    "renamed_when_complete",
    "write_durably",
    "write_new",
    "write_text",
]

_PARTIAL = ".partial"
_LONGEST = 200  # bytes of a name that its temporary name begins with; a name may have 255
# What a user names there is written to as it is: /dev/stdout, which a shell may lead to a file.
_STREAMS = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))


def write_durably(
    path: str | Path,
    write: Callable[[IO[bytes]], Any],
    *,
    check: Callable[[Path], str | None] | None = None,
) -> None:
    """Write a file beside its place, flush it to the disk, and only then rename it.

    A link at the place is replaced by the file; what it leads to is left alone.

    Args:
        path: of the file; its folder is made.
        write: is given the open file.
        check: says what is wrong with the written file, or None; called before the renaming.

    Raises:
        OSError: it cannot be written, as on a full disk; names the path. What stood at its place
            still does.
        UserError: what stands at its place is no file.
    """
    path = Path(path)
    if path.parent in _STREAMS and path.exists():
        with path.open("wb") as stream:
            write(stream)
        return
    with renamed_when_complete(path) as partial:
        with partial.open("xb") as file:  # fails where anything has that name, a link too
            write(file)
            file.flush()
            os.fsync(file.fileno())
        wrong = check(partial) if check is not None else None
        if wrong:
            raise OSError(f"{path} is not what was written: {wrong}")


@contextlib.contextmanager
def renamed_when_complete(path: Path) -> Iterator[Path]:
    """A new name beside a file, for whoever cannot write to an open one; then it is renamed.

    Raises:
        OSError, UserError: see :func:`write_durably`.
    """
    mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder: a file is to be written there")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise UserError(f"{path} is neither a file nor a folder: it is not written to")
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = path.stem if len(os.fsencode(path.name)) <= _LONGEST else ""
    # With the same ending, by which some writers choose a format.
    partial = path.with_name(f".{begin}.{secrets.token_hex(8)}{_PARTIAL}{path.suffix[-16:]}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)
            error.filename2 = None
        raise
    _flush_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """:func:`write_durably`, of a text in UTF-8.

    Raises:
        OSError, UserError: see there.
    """
    content = text.encode("utf-8", "backslashreplace")
    write_durably(path, lambda file: file.write(content))


def write_new(path: Path, content: str | IO[bytes]) -> None:
    """Write one of many files of a new folder, which only becomes what it is by a renaming.

    Args:
        path: of the file.
        content: a text, or an open file to copy.

    Raises:
        FileExistsError: something has its name.
        OSError: it cannot be written.
    """
    with path.open("xb") as file:  # fails where anything has that name, a link too
        if isinstance(content, str):
            file.write(content.encode("utf-8", "backslashreplace"))
        else:
            shutil.copyfileobj(content, file)


def open_log(path: str | Path) -> IO[bytes]:
    """Open a file to append to, which stays open for long; it is made where it is not there.

    Raises:
        UserError: it is a link, or no file.
        OSError: it cannot be opened.
    """
    path = Path(path)
    refuse_links(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: what is said cannot be appended to it")

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    return open(path, "ab", opener=opener)


def refuse_links(*paths: str | Path) -> None:
    """Refuse links at places that are written to for long, and are not replaced as a whole.

    Raises:
        UserError: one of them is a link; names it.
    """
    for path in map(Path, paths):
        if path.is_symlink():
            raise UserError(
                f"{path} is a link, to {os.readlink(path)}: what it leads to would be written to. "
                "Remove it, or choose another folder"
            )


def remove_links(*paths: Path) -> None:
    """Remove links from where other packages are about to write, who would follow them."""
    for path in paths:
        if path.is_symlink():
            path.unlink()


def make_folder(path: str | Path) -> Path:
    """Make a folder within one of the project's; it may not be a link to elsewhere.

    Raises:
        UserError: it is a link.
        OSError: it cannot be made.
    """
    path = Path(path)
    refuse_links(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def private_folder(path: str | Path) -> Path:
    """Make a folder that nobody else can write to or look into.

    Raises:
        OSError: somebody else has made it, or it is a link.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is no folder")
    if hasattr(os, "geteuid"):
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to somebody else")
        if stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(0o700)
    return path


def remove_partial_files(folder: str | Path) -> None:
    """Remove what killed processes have left of :func:`write_durably` in a folder."""
    for leftover in Path(folder).glob(f".*{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _flush_folder(folder: Path) -> None:
    """Make a renaming permanent; where a system cannot, its own order has to do."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
