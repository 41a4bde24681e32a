"""What a training step costs: seconds, and memory beyond weights and optimiser."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["StepCost", "call_in_process", "cost_of_a_step"]


class StepCost(NamedTuple):
    """Of one training step."""

    seconds: float
    """On a GPU by the clock; on a CPU those of the processor, which other work disturbs least."""
    memory: float
    """MiB that PyTorch allocates in a step at most, beyond what is in use before."""


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
    """Seconds of this process's threads; memory that PyTorch has allocated."""

    def seconds(self) -> float:
        return time.process_time()

    def peak_memory(self, step: Callable[[], None]) -> float:
        # Of what the system gives a process, libraries keep parts, by chance; this is exact.
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        events = profiler.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        if not changes:
            raise RuntimeError("PyTorch's profiler reports no memory")
        changes.sort(key=lambda change: change[0])
        return max(itertools.accumulate(nbytes for _, nbytes in changes)) / 2**20
