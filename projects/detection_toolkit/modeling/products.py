"""Float32 matrix products on a CPU, by PyTorch's usual library or by oneDNN.

PyTorch hands them to oneDNN where ``torch.backends.mkldnn.matmul.fp32_precision`` allows bfloat16.
Only processors with AMX then round to bfloat16: on all others oneDNN computes in float32. On AMD's
it is faster than MKL, PyTorch's usual library, which does not choose its fastest kernels there
(``python tools/benchmark.py``).
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

__all__ = ["LEAST_PARAMETERS", "Products", "by_onednn", "wants_onednn"]

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
    # Whatever the device and the type are that a model is just being built with.
    x = torch.arange(2**16, dtype=torch.float32, device="cpu").view(4, 128, 128)
    x += 2**23  # 24 bits each
    one = torch.eye(128, dtype=torch.float32, device="cpu")
    with by_onednn(), torch.autocast("cpu", enabled=False):
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

    In all threads; scopes may overlap. A precision below float32 that the user has set, by
    ``torch.backends`` or ``torch.set_float32_matmul_precision``, stays.
    """
    setting = _setting()
    if setting is None or not _scopes.enter(setting):
        yield
        return
    try:
        yield
    finally:
        _scopes.leave(setting)


class Products:
    """How a detector computes matrix products: scopes for its passes."""

    def __init__(self, choice: str, *, parameters: int, compile: str = ""):
        """
        Args:
            choice, parameters: see :func:`wants_onednn`.
            compile: ``model.execution.compile``. ``max-autotune`` asks PyTorch for one precision of
                all libraries, which fails in :func:`by_onednn`.

        Raises:
            UserError: see :func:`wants_onednn`.
        """
        self._in_bfloat16 = choice == "bfloat16"
        self._by_onednn = wants_onednn(choice, parameters) and compile != "max-autotune"

    def forward(self, device: str) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass on a type of device."""
        if self._in_bfloat16:
            return torch.autocast(device, torch.bfloat16)
        return self.backward(device)

    def backward(self, device: str) -> contextlib.AbstractContextManager[None]:
        """Around a backward pass, which knows the types of its forward pass."""
        return by_onednn() if self._by_onednn and device == "cpu" else contextlib.nullcontext()
