"""How long the threads of an operation wait for the next one before they sleep.

Between two operations a thread of OpenMP spins: it keeps its core busy. GNU's runtime, which
PyTorch's Linux packages bring along, does so for milliseconds. That is right where nothing else
wants the core, and it starves the others where something does: loader processes, other runs, other
users.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["SPINS", "SPINS_BESIDE_OTHERS", "wait_briefly"]

SPINS = "3000"
"""Turns of the waiting loop, tens of microseconds: longer than most pauses within a step."""

SPINS_BESIDE_OTHERS = "1000"
"""Where every core has other work to do: shorter than some pauses, which costs a quiet machine."""

LOAD = Path("/proc/loadavg")
"""Linux's: load of 1, 5 and 15 minutes, threads that run or wait for a core / all, last process."""


def wait_briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let threads of GNU's OpenMP spin briefly, unless the user has chosen how threads wait.

    The runtime reads its environment once, when PyTorch loads it: this comes before. Where others
    want all cores at that moment, threads wait still more briefly. Other OpenMP runtimes do not
    read the variable.

    Args:
        environ: changed in place; processes that are started later inherit it.
    """
    chosen = any(
        name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") or name.startswith("KMP_") for name in environ
    )
    if not chosen:
        # Processes that a launcher starts together would count each other.
        beside = "LOCAL_RANK" not in environ and _others_want_all_cores()
        environ["GOMP_SPINCOUNT"] = SPINS_BESIDE_OTHERS if beside else SPINS


def _others_want_all_cores() -> bool:
    """Whether as many threads of others as there are cores want to run now; False if unknown."""
    try:
        running = int(LOAD.read_text().split()[3].split("/")[0]) - 1  # the reader itself runs
    except (OSError, ValueError, IndexError):
        return False
    return running >= (os.cpu_count() or 1)
