"""Processes that load data: what they make of signals, and what is said when one has ended."""

from __future__ import annotations

import atexit
import contextlib
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

__all__ = [
    "LoaderProcessError",
    "end_workers_at_exit",
    "init_worker",
    "loader_process_errors",
]

# PyTorch's words, also where it raises them in the middle of something else, as a signal handler.
# An error that a process has passed on begins with "Caught".
_ENDED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class LoaderProcessError(OSError):
    """A process that loads data has ended, or was killed."""


@contextlib.contextmanager
def loader_process_errors(
    part: str,
    *,
    describe: Callable[[], str] = lambda: "",
    processes: Callable[[], set[int]] | None = None,
) -> Iterator[None]:
    """Say what to do when a loader process has ended while this lasts.

    Args:
        part: "train" or "test".
        describe: a sentence on the images that were being loaded, with a space before it.
        processes: ids of those that are meant; by default all.

    Raises:
        LoaderProcessError: in the place of PyTorch's ``RuntimeError``.
    """
    try:
        yield
    except RuntimeError as error:
        match = _ENDED.match(str(error))
        if match is None:
            raise
        ended = set(map(int, match.group(1).split(",")))
        if processes is not None and not ended & processes():
            raise
        which = {"train": "training", "test": "test"}[part]
        raise LoaderProcessError(
            f"a loader process of the {which} data has ended: {str(error).rstrip('. ')}."
            f"{describe()} Most often the machine is short of memory or of shared memory "
            f"(/dev/shm): lower dataloader.{part}.num_workers"
        ) from error


def init_worker(worker_id: int) -> None:
    """A signal to the whole job must not end its loaders: the current step still needs them."""
    signal.signal(signal.SIGTERM, _end_at_second_signal)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _end_at_second_signal(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)


def end_workers_at_exit(batches: Any) -> None:
    """Let loader processes go before the interpreter waits for them.

    A run that ends by an error or a signal keeps its iterator to the last. ``multiprocessing`` then
    sends each of its processes one SIGTERM, which :func:`init_worker` has them overhear, and
    waits for them without end.
    """
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is None:  # without loader processes
        return
    method = weakref.WeakMethod(shut_down)

    def end() -> None:
        alive = method()
        if alive is not None:
            alive()

    atexit.register(end)  # what is registered last is called first
    weakref.finalize(batches, atexit.unregister, end).atexit = False
