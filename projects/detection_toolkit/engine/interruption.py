"""SIGTERM and SIGUSR1: end, and in training write a checkpoint after the current step before."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.utils import comm

__all__ = [
    "EXIT_INTERRUPTED",
    "SIGNALS",
    "InterruptedRun",
    "Interruption",
    "ended_by_signals",
    "handled_by",
    "signal_at_end_of_parent",
]

logger = logging.getLogger(__name__)

# What job schedulers send before they kill; not every system has both.
SIGNALS = ("SIGTERM", "SIGUSR1")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# EX_TEMPFAIL of sysexits.h: try again later, here with --resume.
EXIT_INTERRUPTED = 75


class InterruptedRun(SystemExit):
    """A run has been asked to end, and all it has done is in a checkpoint; its code is 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While this lasts, a function is called at the signals that ask for the end.

    Only a main thread can handle signals; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None: it was not installed from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def signal_at_end_of_parent() -> None:
    """Let the system send SIGTERM when the process that has started this one is gone.

    For whoever is started by a program that does not pass on every signal it dies of. Linux alone
    can do so; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        logger.warning("this process will not notice the end of the one that has started it")


class _Signalled(InterruptedRun):
    """A signal where there is nothing to be written."""

    def __init__(self, number: int):
        super().__init__()
        self.signal_name = signal.Signals(number).name


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """While this lasts, the signals end the process at once, in words and with its own exit code.

    For what surrounds a training, which handles them in its own way: the start, where the last
    checkpoint is all there is, and evaluations without training.

    Raises:
        InterruptedRun: one has come.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    try:
        with handled_by(end):
            yield
    except _Signalled as signalled:
        logger.warning(
            "%s, and not in training: the process ends, nothing is lost. The same command starts "
            "it again",
            signalled.signal_name,
        )
        raise


class Interruption:
    """Notices a signal that asks for the end.

    Attributes:
        signal_name: of the signal that this process was sent, or None.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """While this lasts, the signals are noted instead of ending the process."""
        with handled_by(self._note):
            yield

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def agreed(self, device: str) -> bool:
        """Whether any process of the job has been sent a signal; all of them have to ask."""
        if comm.get_world_size() == 1:
            return self.signal_name is not None
        flag = torch.tensor(float(self.signal_name is not None), device=device)
        dist.all_reduce(flag)
        return bool(flag > 0)
