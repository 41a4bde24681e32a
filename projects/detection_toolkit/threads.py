"""How long the threads of an operation wait for the next one before they sleep.

Between two operations a thread of OpenMP spins: it keeps its core busy. GNU's runtime, which
PyTorch's Linux packages bring along, does so for milliseconds. That is right where nothing else
wants the core, and it starves the others where something does: loader processes, other runs, other
users.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

__all__ = ["SPINS", "wait_briefly"]

SPINS = "3000"
"""Turns of the waiting loop, tens of microseconds: longer than most pauses within a step."""


def wait_briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let threads of GNU's OpenMP spin briefly, unless the user has chosen how threads wait.

    The runtime reads its environment once, when PyTorch loads it: this comes before. Other OpenMP
    runtimes do not read the variable.

    Args:
        environ: changed in place; processes that are started later inherit it.
    """
    chosen = any(
        name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") or name.startswith("KMP_") for name in environ
    )
    if not chosen:
        environ["GOMP_SPINCOUNT"] = SPINS
