"""Timing, memory and the rates that a machine allows."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["alternate", "copy_rate", "product_rate", "resident_memory"]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    runs: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warm_up: int = 1,
) -> dict[str, float]:
    """Median seconds of several functions, which take turns.

    Args:
        runs: what to time; each is called ``warm_up`` times before.
        device: waited for before and after each call.
        rounds: calls of each that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warm_up + rounds):
        gc.collect()  # so that it is not due in the middle of one of them
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Floating point operations a second of a large square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / alternate({"": lambda: a @ b}, device=device, rounds=7)[""]


def copy_rate(device: torch.device, megabytes: int = 128) -> float:
    """Bytes a second, read and written, of a copy that no cache can hold."""
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = alternate({"": lambda: target.copy_(source)}, device=device, rounds=7)[""]
    return 2 * source.numel() * source.element_size() / seconds


def resident_memory(*, peak: bool) -> int:
    """Bytes of physical memory that the process has, or at most had (Linux).

    Raises:
        OSError: the system has no /proc.
    """
    field = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
