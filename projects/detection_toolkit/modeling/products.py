"""Float32 matrix products on a CPU, by PyTorch's usual library or by oneDNN.

PyTorch hands them to oneDNN where ``torch.backends.mkldnn.matmul.fp32_precision`` allows bfloat16.
Only processors with AMX then round to bfloat16: on all others oneDNN computes in float32, and on
AMD's it is about twice as fast as MKL, PyTorch's usual library, which does not choose its fastest
kernels there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

__all__ = ["LEAST_PARAMETERS", "by_onednn", "wants_onednn"]

LEAST_PARAMETERS = 2**23
"""From which ``auto`` chooses oneDNN. A call of it takes ten microseconds longer: in small models
that is more than there is to gain."""

CPU_INFO = Path("/proc/cpuinfo")


def wants_onednn(choice: str, parameters: int) -> bool:
    """Whether a model's products go to oneDNN.

    Args:
        choice: ``model.execution.products``.
        parameters: numbers in the model's parameters.

    Raises:
        UserError: ``onednn`` is chosen where it cannot be had in float32.
    """
    if choice in ("torch", "bfloat16"):
        return False
    if choice == "auto":
        # What was timed plays no part, so that a machine always computes the same numbers.
        return parameters >= LEAST_PARAMETERS and _is_amd(CPU_INFO) and _is_float32()
    if not _is_float32():
        raise UserError(
            "model.execution.products=onednn needs PyTorch 2.9 or newer, built with oneDNN, and a "
            "processor without AMX, where oneDNN would round to bfloat16: leave it at auto"
        )
    return True


def _setting() -> Any:
    """PyTorch's switch; None where this build has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


@functools.cache
def _is_amd(cpu_info: Path) -> bool:
    try:
        lines = cpu_info.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "vendor_id":
            return value.strip() == "AuthenticAMD"
    return False


@functools.cache
def _is_float32() -> bool:
    """Whether oneDNN keeps all bits of float32 here, in products of matrices and of batches."""
    if _setting() is None:
        return False
    x = torch.arange(2**16, dtype=torch.float32).view(4, 128, 128) + 2**23  # 24 bits each
    one = torch.eye(128)
    with by_onednn():
        products = x[0] @ one, torch.bmm(x, one.expand_as(x))
    return all(map(torch.equal, products, (x[0], x)))


class _Scopes:
    """Those that are open now; PyTorch's switch is one for the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._before = ""

    def enter(self, setting: Any) -> bool:
        """Whether this one is to be left: not where the user has chosen."""
        with self._lock:
            if not self._open:
                self._before = setting.fp32_precision
                if self._before not in ("none", "ieee"):
                    return False
                setting.fp32_precision = "bf16"
            self._open += 1
            return True

    def leave(self, setting: Any) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                setting.fp32_precision = self._before


_scopes = _Scopes()


@contextlib.contextmanager
def by_onednn() -> Iterator[None]:
    """While this lasts, float32 products on a CPU are oneDNN's, forward and backward.

    In all threads; scopes may overlap. A precision of ``torch.backends`` or
    ``torch.set_float32_matmul_precision`` that the user has set stays.
    """
    setting = _setting()
    if setting is None or not _scopes.enter(setting):
        yield
        return
    try:
        yield
    finally:
        _scopes.leave(setting)
