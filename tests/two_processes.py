"""Two processes of one job, which need not import everything anew."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp


def run_two_processes(work: Callable[[int, Path], None], folder: Path) -> None:
    """Call ``work(rank, folder)`` in two processes, and raise what one of them raises.

    They are forked from a server that has imported the packages once for all tests, and has neither
    threads nor a GPU in use, as this process may have.
    """
    multiprocessing.set_forkserver_preload(["detection_toolkit.engine", "pytest"])
    arguments = (dict(os.environ), work, folder)
    mp.start_processes(_run, args=arguments, nprocs=2, start_method="forkserver")


def _run(
    rank: int, environment: dict[str, str], work: Callable[[int, Path], None], folder: Path
) -> None:
    os.environ.update(environment)  # the server has that of its start
    work(rank, folder)
