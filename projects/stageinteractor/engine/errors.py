"""What a user reads when something is wrong that the user can mend."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Collection, Iterator

import torch.distributed
from detectron2.utils import comm

__all__ = ["PROJECTS", "is_user_error", "user_errors"]

# The packages of this repository.
PROJECTS = ("stageinteractor", "adamixer", "sqr", "dfvt")


@contextlib.contextmanager
def user_errors(*modules: str) -> Iterator[None]:
    """Turn errors that a user can mend into one line, and exit code 1.

    Everything else keeps its traceback: it is a mistake in a program.

    Args:
        modules: whose own checks are meant besides those of the projects, as the command line's;
            see :func:`is_user_error`.

    Raises:
        SystemExit: with the line as its code.
    """
    try:
        yield
    except Exception as error:
        process = f" in process {comm.get_rank()}" if comm.get_world_size() > 1 else ""
        if process and _has_lost_another(error):
            sys.exit(
                f"error{process}: the connection to another process is lost. It has ended, and its "
                "own message, before or after this one, says why"
            )
        if not is_user_error(error, (*PROJECTS, *modules)):
            raise
        sys.exit(f"error{process}: {_message(error)}")


def is_user_error(error: BaseException, packages: Collection[str] = ("stageinteractor",)) -> bool:
    """Whether a missing file, a full disk or the like is the reason, or a check of the project.

    Args:
        error: as caught, with its traceback.
        packages: a ``ValueError``, ``KeyError``, ``ImportError`` or ``FloatingPointError`` counts
            where it was raised in one of these, or is a class of one of these. The same raised
            deep inside a library counts as a program's mistake.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, (ValueError, KeyError, ImportError, FloatingPointError)):
        return False
    if type(error).__module__.split(".")[0] in packages:
        return True  # also when a loader process has raised it, whose traceback is gone
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").split(".")[0] in packages


def _has_lost_another(error: BaseException) -> bool:
    """Whether a collective operation failed as another process of the job is gone."""
    kinds = tuple(
        getattr(torch.distributed, name)
        for name in ("DistBackendError", "DistNetworkError", "DistStoreError")
        if hasattr(torch.distributed, name)
    )
    # Gloo raises a plain RuntimeError that names its source file.
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _message(error: BaseException) -> str:
    # The text of a KeyError is the representation of its argument.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:  # from a loader process
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
    return text or type(error).__name__
