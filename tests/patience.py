"""How long tests wait for what must happen: so long that only what never happens fails.

A machine that runs the tests may be many times slower than the one that they were written on, and
its processes may stand still for seconds. So a wait that ends by itself has this one limit, however
short it is as a rule; what a process has printed is shown when it is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

PATIENCE = 600.0
"""Seconds; to be waited only by a test that fails."""
_LOOK = 0.02  # seconds from one look to the next

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T],
    what: str,
    *,
    process: subprocess.Popen | None = None,
    output: Callable[[], str] = str,
) -> T:
    """The first true value of a condition.

    Args:
        condition: asked again and again.
        what: is waited for, in words.
        process: which brings it about; its end before that is a failure as well.
        output: what has been printed, for the message of a failure; the default has nothing.
    """
    end = time.monotonic() + PATIENCE
    while True:
        # The order matters: a process may end right after it has done what is waited for.
        is_over = process is not None and process.poll() is not None
        now = time.monotonic()
        if value := condition():
            return value
        if is_over or now > end:
            reason = f"the process has ended: {process.args}" if is_over else f"{PATIENCE:.0f} s"
            pytest.fail(f"{what}: waited in vain ({reason})\n{output()}")
        time.sleep(_LOOK)


def start(command: Sequence[Any], **options: Any) -> subprocess.Popen:
    """A process, first of a process group of its own, so that none of its children is left.

    Its output is captured, unless the options of ``Popen`` say otherwise.
    """
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, **{**defaults, **options})


def killed(process: subprocess.Popen) -> str:
    """What a process has printed, and those that it has started; none of them is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0] or ""


def outputs(*processes: subprocess.Popen) -> list[str]:
    """What each process has printed when it has ended by itself; all are of :func:`start`."""
    end = time.monotonic() + PATIENCE
    texts: list[str] = []
    try:
        for process in processes:
            left = max(0.0, end - time.monotonic())
            texts.append(process.communicate(timeout=left)[0] or "")
    except subprocess.TimeoutExpired as error:
        texts += map(killed, processes[len(texts) :])
        shown = "\n".join(texts)
        pytest.fail(f"{error.cmd} has not ended within {PATIENCE:.0f} s:\n{shown}")
    except BaseException:
        for process in processes[len(texts) :]:
            killed(process)
        raise
    return texts


def run(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess:
    """``subprocess.run`` of a command that has to end; its output is text, and captured."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        return subprocess.run(command, timeout=PATIENCE, **{"text": True, **pipes, **options})
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        parts = (
            p.decode(errors="replace") if isinstance(p, bytes) else p
            for p in (error.stdout, error.stderr)
        )
        pytest.fail("\n".join([str(error), *filter(None, parts)]))
