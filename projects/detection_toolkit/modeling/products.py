"""Products of linear layers on a CPU, by PyTorch's own library or by oneDNN."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = [
    "LEAST_OPERATIONS",
    "OneDnnLinear",
    "gradient_of_input",
    "gradient_of_weight",
    "is_by_onednn",
    "product",
    "use_onednn",
    "wants_onednn",
]

LEAST_OPERATIONS = 2**24
"""Multiplications and additions from which a product goes to oneDNN. Below, a product takes a tenth
of a millisecond, and calls cost as much as there is to gain."""

CPU_INFO = Path("/proc/cpuinfo")


def wants_onednn(choice: str) -> bool:
    """Whether products go to oneDNN.

    Args:
        choice: ``model.execution.products``. ``auto``: where the processor is AMD's, for which MKL,
            PyTorch's own, does not choose its fastest kernels. What was timed plays no part, so
            that a machine always computes the same numbers.
    """
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_op and (choice == "onednn" or (choice == "auto" and _is_amd(CPU_INFO)))


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


def use_onednn(module: nn.Module) -> None:
    """Let all of PyTorch's linear layers in ``module`` compute by oneDNN.

    Parameters and their names stay. Subclasses of :class:`torch.nn.Linear` are left alone.
    """
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """PyTorch's linear layer, whose large float32 products on a CPU are oneDNN's.

    Where something looks at or changes the operators (autocast, compilers, export, traces,
    dispatch modes such as counters of operations, transforms of ``torch.func``), and for all other
    tensors, it is :class:`torch.nn.Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        if not is_by_onednn(self, x):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            # The view is made outside, so that who calls may change the result in place.
            y = _Linear.apply(x.flatten(0, -2), self.weight, self.bias)
            return y.view(*x.shape[:-1], -1)
        return product(x, self.weight, self.bias)


def is_by_onednn(layer: nn.Linear, x: Tensor) -> bool:
    """Whether this layer computes its products for ``x`` (..., C) by oneDNN."""
    if not isinstance(layer, OneDnnLinear) or _is_watched():
        return False
    weight, bias = layer.weight, layer.bias
    return (
        type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and (bias is None or type(bias) in (Tensor, nn.Parameter))
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.device.type == weight.device.type == "cpu"
        and x.layout == torch.strided
        and x.ndim >= 2
        and x.shape[-1] == weight.shape[1]
        and 2 * x.numel() * weight.shape[0] >= LEAST_OPERATIONS
        and torch.backends.mkldnn.enabled
    )


def _is_watched() -> bool:
    """Whether something looks at or changes the operators that are called."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or torch.is_autocast_enabled("cpu")
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b by oneDNN, without gradients.

    Args:
        x: (..., C) float32; copied unless it is contiguous.
        weight: (C', C), contiguous or a transposed view of something contiguous.
        bias: (C',).
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def gradient_of_input(grad: Tensor, weight: Tensor) -> Tensor:
    """(n, C') by (C', C) -> (n, C), of :func:`product`."""
    # Backward passes are watched for themselves: somebody may count in one of the two alone.
    return grad @ weight if _is_watched() else product(grad, weight.t())


def gradient_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """(n, C') and (n, C) -> (C', C), of :func:`product`."""
    if _is_watched():
        return grad.t() @ x
    # The first argument is copied if transposed, and so is a transposed result, as gradients lie
    # in memory as parameters do: whichever of the two ways copies less.
    (n, outputs), inputs = grad.shape, x.shape[1]
    if n * outputs <= (n + outputs) * inputs:
        return product(grad.t(), x.t())
    return product(x.t(), grad.t()).t().contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # gradients of gradients are PyTorch's own
            of_x = grad @ weight if needs_x else None
            of_weight = grad.t() @ x if needs_weight else None
        else:
            of_x = gradient_of_input(grad, weight) if needs_x else None
            of_weight = gradient_of_weight(grad, x) if needs_weight else None
        return of_x, of_weight, grad.sum(0) if needs_bias else None
