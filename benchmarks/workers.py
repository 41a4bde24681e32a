"""Processes that are timed in turns, each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

__all__ = ["Worker", "answer"]

_MARK = "measured "


class Worker:
    """A process of a benchmark that measures once for each line of its input."""

    def __init__(self, module: str, arguments: Sequence[str], environ: Mapping[str, str]):
        """
        Args:
            module: is run with ``-m`` and the arguments, and calls :func:`answer`.
            arguments: of the module.
            environ: added to this process's own.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, work: str) -> list[float]:
        """What the process answers to a line.

        Raises:
            OSError: it has ended; its message is on stderr.
        """
        print(work, file=self._process.stdin, flush=True)
        for line in self._process.stdout or ():
            if line.startswith(_MARK):
                return [float(word) for word in line.removeprefix(_MARK).split()]
        raise OSError(f"the process that measures has ended with exit code {self._process.wait()}")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def answer(*numbers: float) -> None:
    """Of the process, to a line of its input."""
    print(_MARK + " ".join(map(str, numbers)), flush=True)
