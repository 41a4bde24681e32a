"""What a user reads when something is wrong that the user can fix."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import multiprocessing
import re
import sys
import traceback
from collections.abc import Iterator

from .. import require_detectron2
from ..errors import UserError
from ..texts import printable

__all__ = ["EXIT_CTRL_C", "is_user_error", "user_errors"]

# As shells have it: 128 and the signal's number.
EXIT_CTRL_C = 130


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that a user can fix into one line, and exit code 1; Ctrl-C into one, and 130.

    Everything else keeps its traceback: it is a mistake in a program.

    Raises:
        SystemExit: with the line as its code.
        ImportError: Detectron2 is installed and does not import.
    """
    require_detectron2()
    from detectron2.utils import comm

    try:
        with _without_noise():
            yield
    except KeyboardInterrupt:
        # Of several processes, the one that has started the others, or the first, says it.
        if comm.is_main_process() and multiprocessing.parent_process() is None:
            print("interrupted by Ctrl-C: what is complete is kept", file=sys.stderr)
        sys.exit(EXIT_CTRL_C)
    except Exception as error:
        process = f" in process {comm.get_rank()}" if comm.get_world_size() > 1 else ""
        if process and _has_lost_another(error):
            sys.exit(
                f"error{process}: the connection to another process is lost. It has ended, and its "
                "own message, before or after this one, says why"
            )
        missing = _module_that_a_config_lacks(error)
        if missing:
            sys.exit(
                f"error{process}: the config names {missing[0]}, and Python finds no module "
                f"{missing[1]}: put the folder that has it into PYTHONPATH, or install its package"
            )
        if argument := _argument_that_a_config_has_wrong(error):
            sys.exit(f"error{process}: {argument}")
        from omegaconf.errors import OmegaConfBaseException  # what fails, may take its time

        if isinstance(error, OmegaConfBaseException):
            # Of a key that a config lacks, or refers to; whose own message has several lines.
            reason = printable((error.msg or str(error)).partition("\n")[0])
            key = f" (at {printable(error.full_key)})" if error.full_key else ""
            sys.exit(f"error{process}: the config cannot be used: {reason}{key}")
        if not is_user_error(error):
            raise
        sys.exit(f"error{process}: {_message(error)}")


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Leave out what PyTorch says of a compiler for GPUs that this machine does not have."""

    def tells_something(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No CUDA runtime is found")

    noisy = logging.getLogger("torch.utils.cpp_extension")
    noisy.addFilter(tells_something)
    try:
        yield
    finally:
        noisy.removeFilter(tells_something)


def is_user_error(error: BaseException) -> bool:
    """Whether a check of the project, or a missing file, a full disk or the like is the reason."""
    return isinstance(error, (UserError, OSError))


def _has_lost_another(error: BaseException) -> bool:
    """Whether a collective operation failed as another process of the job is gone."""
    import torch.distributed

    kinds = tuple(
        getattr(torch.distributed, name)
        for name in ("DistBackendError", "DistNetworkError", "DistStoreError")
        if hasattr(torch.distributed, name)
    )
    # Gloo raises a plain RuntimeError that names its source file.
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _module_that_a_config_lacks(error: BaseException) -> tuple[str, str] | None:
    """A ``_target_`` and its module, where that is not installed; as Hydra tells it."""
    if not isinstance(error, ImportError):
        return None
    pattern = r"Error loading '([\w.]+)':\s*ModuleNotFoundError\(\"No module named '([\w.]+)'\"\)"
    match = re.match(pattern, str(error))
    if match is None or match[1].split(".")[0] != match[2].split(".")[0]:
        return None  # the module is there, and what it imports is not
    return match[1], match[2]


def _argument_that_a_config_has_wrong(error: BaseException) -> str | None:
    """What a node of a config gives to what it calls, and should not, or lacks, in a line."""
    if not isinstance(error, TypeError) or error.__traceback__ is None:
        return None
    from detectron2.config import instantiate

    calls = [
        frame.f_locals
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code is instantiate.__code__
    ]
    if not calls or "cls_name" not in calls[-1]:
        return None
    target, given = printable(str(calls[-1]["cls_name"])), calls[-1]["cfg"]
    refused = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
    taken = _arguments(calls[-1]["cls"]) if refused else []
    # What it does take was refused further down, by no fault of the config.
    if refused and refused[1] in given and refused[1] not in taken:
        near = difflib.get_close_matches(refused[1], taken, n=3, cutoff=0.5)
        hint = f": the nearest are {', '.join(near)}" if near else ""
        return f"the config gives {target} an argument {refused[1]}, which it does not take{hint}"
    # Said by Python of the call itself, or of one that is further down, and no config's.
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    lacking = re.search(r"missing \d+ required .* arguments?: (.+)", str(error))
    if lacking and last.f_code is instantiate.__code__:
        return f"the config lacks what {target} needs: {printable(lacking[1])}"
    return None


def _arguments(target: object) -> list[str]:
    """Of a callable; of a class also those that it may hand on to the classes it is made of."""
    named = []
    for made_by in [c.__init__ for c in getattr(target, "__mro__", ())] or [target]:
        with contextlib.suppress(TypeError, ValueError):
            named += inspect.signature(made_by).parameters
    return [name for name in dict.fromkeys(named) if name not in ("self", "args", "kwargs")]


def _message(error: BaseException) -> str:
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:  # from a loader process
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
    return printable(text) or type(error).__name__
