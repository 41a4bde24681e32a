"""What a training step costs: seconds, and memory beyond weights and optimiser."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["StepCost", "call_in_process", "cost_of_a_step"]


class StepCost(NamedTuple):
    """Of one training step."""

    seconds: float
    """On a GPU by the clock; on a CPU those of the processor, which other work disturbs least."""
    memory: float
    """MiB that a step takes at most, beyond what is in use before."""


def call_in_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a new process, which logs warnings only, and return what it returns.

    Raises:
        OSError: the process was ended from outside, as the system does when memory is short.
        Exception: what the function raises.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=logging.disable, initargs=(logging.INFO,)
    ) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise OSError(
                "the process that measures was ended from outside; is the memory large enough?"
            ) from error


def cost_of_a_step(
    step: Callable[[], None],
    free_gradients: Callable[[], None],
    *,
    device: str,
    steps: int,
) -> StepCost:
    """Median over some steps, after one to warm up; the memory is that of a further one.

    To be called once in a process: measuring memory changes how the process takes it from then on.

    Args:
        step: forward, backward and update.
        free_gradients: what is called before memory is measured.
        device: cpu or cuda.
    """
    step()  # allocates the optimiser's state, too
    meter = _GpuMeter() if device.startswith("cuda") else _CpuMeter()
    seconds = []
    for _ in range(steps):
        begin = meter.seconds()
        step()
        seconds.append(meter.seconds() - begin)
    free_gradients()
    return StepCost(statistics.median(seconds), meter.peak_memory(step))


class _GpuMeter:
    """Seconds by the clock; memory that PyTorch has allocated."""

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak_memory(self, step: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class _CpuMeter:
    """Seconds of this process's threads; resident memory."""

    M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

    def seconds(self) -> float:
        return time.process_time()

    def peak_memory(self, step: Callable[[], None]) -> float:
        gc.collect()
        with suppress(AttributeError, OSError):
            # glibc keeps much of what is freed, which then would not count. From here on it hands
            # memory back at once; that costs time, so times are measured before.
            libc = ctypes.CDLL(None)
            libc.mallopt(self.M_MMAP_THRESHOLD, 2**16)
            libc.malloc_trim(0)
        is_new_peak = False
        with suppress(OSError):  # Linux alone can begin a new peak
            Path("/proc/self/clear_refs").write_text("5")
            is_new_peak = True
        before = self._peak(is_new_peak)
        step()
        return self._peak(is_new_peak) - before

    @staticmethod
    def _peak(is_new_peak: bool) -> float:
        if is_new_peak:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
