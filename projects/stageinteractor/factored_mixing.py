"""Cascade dynamic mixing without writing out any adapted channel filter.

The adapted filter of :class:`ChannelFilterAdapter` is, with D = M_j - M,

    M'' = M + diag(r) D diag(c),   so that   X M'' = X M + ((X diag(r)) D) diag(c).

There are about half as many sampled features X as filter entries, so scaling X is cheaper than
making M' and M'', and neither they nor their gradients are kept. What a backward pass can get back
by cheap products is not kept either.

Letters as in :mod:`.mixing`; n = B N G.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .filter_bank import FilterBank
from .mixing import CascadeDynamicMixing

__all__ = ["FactoredDynamicMixing", "NormReLU"]

NORM_EPS = 1e-5  # of LN2


class NormReLU(nn.LayerNorm):
    """ReLU(LN2(y))."""

    def __init__(self, shape: tuple[int, int]):
        """
        Args:
            shape: the last two dimensions.
        """
        super().__init__(shape, eps=NORM_EPS, elementwise_affine=False)

    def forward(self, y: Tensor) -> Tensor:
        if _let_autograd_choose(y):
            return super().forward(y).relu_()
        return _NormReLU.apply(y)


class FactoredDynamicMixing(CascadeDynamicMixing):
    """Computes what :class:`CascadeDynamicMixing` does, in less time and memory."""

    def __init__(self, channels: int, **arguments):
        """See :class:`CascadeDynamicMixing`."""
        super().__init__(channels, **arguments)
        self.channel_norm = NormReLU(self.channel_norm.normalized_shape)
        self.spatial_norm = NormReLU(self.spatial_norm.normalized_shape)

    def generate(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        channel, spatial = super().generate(queries)
        # Each product with it copied a view of the generator's output.
        return channel.contiguous(), spatial

    def mix_channels(
        self, x: Tensor, queries: Tensor, own: Tensor, bias: Tensor | float, bank: FilterBank
    ) -> Tensor:
        adapter = self.channel_adapter
        if self.num_reused and adapter is None:
            return super().mix_channels(x, queries, own, bias, bank)
        residual = x.flatten(0, 2)  # (n, PQ, e)
        own = own.flatten(0, 2)  # (n, e, e)
        y = _matmul(residual, own, bias).view_as(x)
        if not self.num_reused:
            return self.channel_norm(y)

        gates = adapter.gate_values(queries).flatten(0, 2)  # (n, e, 2, number of filters)
        biases = adapter.bias(queries).unflatten(-1, (self.groups, self.num_reused, -1))
        biases = biases.flatten(0, 2)  # (n, number of filters, e)
        for j, banked in enumerate(bank.newest(self.num_reused)):
            static = self.static_mixing[j]
            residual, y = _reused_filter(
                self.channel_norm,
                y,
                residual,
                static.across_base_points.weight,
                static.across_base_points.bias,
                static.across_sub_points.weight,
                static.across_sub_points.bias,
                own,
                banked.channel.flatten(0, 2),
                gates[:, :, 1, j],
                gates[:, :, 0, j],
                biases[:, j],
            )
        return self.channel_norm(y)

    def spatial_filters(self, queries: Tensor, own: Tensor, bank: FilterBank) -> Tensor:
        if self.spatial_adapter is None:
            return own
        banked = bank.newest(1)[0].spatial[..., : self.rows, :, :].flatten(-2)
        a, b = self.spatial_adapter.gate_values(queries)
        # V'' = Sp + a b (V - Sp)
        adapted = torch.lerp(own, banked, a[..., :, None] * b[..., None, :])
        return torch.cat([own, adapted], dim=-2)

    def mix_points(self, x: Tensor, spatial: Tensor, bias: Tensor | float) -> Tensor:
        y = _matmul(spatial.flatten(0, 2), x.flatten(0, 2), bias)
        y = y.view(*x.shape[:3], self.out_points, -1)
        projection = self.out_proj
        if _let_autograd_choose(y):
            return projection(self.spatial_norm(y).flatten(2))
        with torch.no_grad():
            x = self.spatial_norm(y)
        return _ProjectNormReLU.apply(x, y, projection.weight, projection.bias)


def _let_autograd_choose(x: Tensor) -> bool:
    """Compilers fuse by themselves, autocast needs to see every product: both get plain steps."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


def _matmul(x: Tensor, filters: Tensor, bias: Tensor | float) -> Tensor:
    """X M + b of n matrices, b broadcast from (B, N, G, ., .)."""
    if not isinstance(bias, Tensor):
        return torch.bmm(x, filters) + bias
    return torch.baddbmm(bias.flatten(0, 2), x, filters)


def _reused_filter(norm: NormReLU, y: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Normalisation and ReLU, static mixing, then one adapted channel filter.

    Args:
        norm: LN2 and ReLU.
        y: (B, N, G, PQ, e) points before them.
        arguments: residual (n, PQ, e); weight and bias of the static mixing across base points
            and across sub-points; M (n, e, e); M_j (n, e, e); row gates (n, e); column gates
            (n, e); filter bias (n, e).

    Returns:
        output of the static mixing (n, PQ, e), and of the filter before LN2 (B, N, G, PQ, e).
    """
    if _let_autograd_choose(y):
        residual, filtered = _compute(norm(y).flatten(0, 2), *arguments)
        return residual, filtered.view_as(y)
    with torch.no_grad():
        x = norm(y)
    return _ReusedFilter.apply(x, y, *arguments)


def _compute(
    x, residual, base_weight, base_bias, sub_weight, sub_bias, own, banked, row, column, bias
) -> tuple[Tensor, Tensor]:
    n, _, e = x.shape
    p, q = len(base_bias) // e, len(sub_bias) // e
    across_base = (_by_sub_point(x, p, q) @ base_weight.t()).view(n, q, p, e)
    mixed = residual.view(n, p, q, e) + across_base.transpose(1, 2)
    # Both biases in one pass: (P, 1, e) + (Q, e).
    mixed += base_bias.view(p, 1, e) + sub_bias.view(q, e)
    across_sub = x.reshape(n * p, q * e)
    mixed = torch.addmm(mixed.view(n * p, q * e), across_sub, sub_weight.t()).view(n, p * q, e)
    filtered = torch.baddbmm(bias[:, None], mixed, own)
    change = torch.bmm(mixed * row[:, None], banked - own)
    return mixed, filtered.addcmul_(change, column[:, None])


def _by_sub_point(x: Tensor, p: int, q: int) -> Tensor:
    """(n, P Q, e) -> (n Q, P e)."""
    n, _, e = x.shape
    return x.view(n, p, q, e).transpose(1, 2).reshape(n * q, p * e)


def _norm_relu(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU(LN2(y)), and for its gradient the mean and the scale of LN2."""
    x, mean, scale = torch.native_layer_norm(y, y.shape[-2:], None, None, NORM_EPS)
    return x.relu_(), mean, scale


def _norm_relu_backward(
    grad: Tensor, x: Tensor, y: Tensor, mean: Tensor, scale: Tensor, *, out: Tensor
) -> Tensor:
    """Gradient of y.

    Args:
        grad: of x.
        x, mean, scale: of :func:`_norm_relu`.
        y: its argument.
        out: overwritten, of the size of y.
    """
    # Multiplying by a mask of truth values would take several times as long.
    grad = torch.ops.aten.threshold_backward.grad_input(grad, x, 0.0, grad_input=out)
    return torch.ops.aten.native_layer_norm_backward(
        grad, y, y.shape[-2:], mean, scale, None, None, [True, False, False]
    )[0]


class _NormReLU(torch.autograd.Function):
    """ReLU(LN2(y)). What takes its result keeps that, too."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        x, mean, scale = _norm_relu(y)
        ctx.save_for_backward(x, y, mean, scale)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _norm_relu_backward(grad, *ctx.saved_tensors, out=torch.empty_like(grad))


class _ProjectNormReLU(torch.autograd.Function):
    """Linear(x) of x = ReLU(LN2(y)), for which y is kept instead of x."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight)
        return F.linear(x.flatten(2), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, weight = ctx.saved_tensors
        x, mean, scale = _norm_relu(y)
        grad = grad.flatten(0, 1)
        grad_weight = grad.t() @ x.flatten(0, 1).flatten(1)  # (C, G O e)
        grad_x = (grad @ weight).view_as(y)
        grad_y = _norm_relu_backward(grad_x, x, y, mean, scale, out=x)
        return None, grad_y, grad_weight, grad.sum(0)


class _ReusedFilter(torch.autograd.Function):
    """:func:`_compute` of x = ReLU(LN2(y)), for which y is kept instead of x, the mixed points, and
    nothing else of that size."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        _, base_weight, _, sub_weight, _, own, banked, row, column, _ = arguments
        mixed, filtered = _compute(x.flatten(0, 2), *arguments)
        ctx.save_for_backward(y, base_weight, sub_weight, own, banked, row, column, mixed)
        ctx.set_materialize_grads(False)
        return mixed, filtered.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mixed: Tensor | None, grad: Tensor):
        y, base_weight, sub_weight, own, banked, row, column, mixed = ctx.saved_tensors
        n, _, e = mixed.shape
        p, q = len(base_weight) // e, len(sub_weight) // e
        grad = grad.flatten(0, 2)

        # filtered = X M + ((X r) D) c + b
        difference = banked - own
        scaled = mixed * row[:, None]
        grad_bias = grad.sum(1)
        grad_column = torch.bmm(scaled, difference).mul_(grad).sum(1)
        grad_change = grad * column[:, None]
        grad_difference = torch.bmm(scaled.transpose(1, 2), grad_change)
        grad_own = torch.baddbmm(grad_difference, mixed.transpose(1, 2), grad, beta=-1)
        grad_scaled = torch.bmm(grad_change, difference.transpose(1, 2))
        del difference, scaled, grad_change
        grad_row = (grad_scaled * mixed).sum(1)
        total = torch.bmm(grad, own.transpose(1, 2)).addcmul_(grad_scaled, row[:, None])
        if grad_mixed is not None:
            total += grad_mixed
        del grad_scaled

        # mixed = A(x) + D(x) + residual
        x, mean, scale = _norm_relu(y)
        points = x.flatten(0, 2)
        by_base = total.view(n * p, q * e)
        grad_x = by_base @ sub_weight
        grad_sub_weight = by_base.t() @ points.view(n * p, q * e)
        by_sub = _by_sub_point(total, p, q)
        grad_x.view(n, p, q, e).add_((by_sub @ base_weight).view(n, q, p, e).transpose(1, 2))
        grad_base_weight = by_sub.t() @ _by_sub_point(points, p, q)
        both = total.sum(0).view(p, q, e)
        grad_base_bias, grad_sub_bias = both.sum(1).flatten(), both.sum(0).flatten()
        return (
            None,
            _norm_relu_backward(grad_x.view_as(y), x, y, mean, scale, out=x),
            total,
            grad_base_weight,
            grad_base_bias,
            grad_sub_weight,
            grad_sub_bias,
            grad_own,
            grad_difference,
            grad_row,
            grad_column,
            grad_bias,
        )
