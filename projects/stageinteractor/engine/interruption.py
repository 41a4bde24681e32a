"""SIGTERM and SIGUSR1: write a checkpoint after the step at hand, and end."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.utils import comm

__all__ = ["EXIT_INTERRUPTED", "SIGNALS", "InterruptedRun", "Interruption"]

logger = logging.getLogger(__name__)

# What job schedulers send before they kill; not every system has both.
SIGNALS = ("SIGTERM", "SIGUSR1")
# EX_TEMPFAIL of sysexits.h: try again later, here with --resume.
EXIT_INTERRUPTED = 75


class InterruptedRun(SystemExit):
    """A run has been asked to end, and has written a checkpoint; its code is 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


class Interruption:
    """Notices a signal that asks for the end.

    Attributes:
        signal_name: of the signal that this process was sent, or None.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """While this lasts, the signals are noted instead of ending the process.

        Only a main thread can handle signals; elsewhere nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in SIGNALS if hasattr(signal, name)]
        before = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in names}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: it was not installed from Python, and cannot be put back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def agreed(self, device: str) -> bool:
        """Whether any process of the job has been sent a signal; all of them have to ask."""
        if comm.get_world_size() == 1:
            return self.signal_name is not None
        flag = torch.tensor(float(self.signal_name is not None), device=device)
        dist.all_reduce(flag)
        return bool(flag > 0)
