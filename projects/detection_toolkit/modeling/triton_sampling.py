"""Gathering sampled features in one CUDA kernel a level, with its backward pass (Triton).

The kernel computes neighbours and weights in registers, so that neither row numbers nor corner
weights go through memory. The plain form is :meth:`~detection_toolkit.modeling.FeatureMaps.sample`.

Letters: n = R B N G P points, e channels of a group, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["gather_level"]

POINTS = 16  # points a program


@triton.jit
def _address(coordinate, size):
    """Lower cell of a place along one axis, and how far the place is beyond it."""
    low = tl.floor(coordinate)
    return low.to(tl.int32), coordinate - low


@triton.jit
def _load_corner(table, row, column, first, height, width, groups, channel, mask, E: tl.constexpr):
    """Values (POINTS, E) of one neighbour, zero outside of the map; and where they lie."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = (first + (row * width + column).to(tl.int64) * groups) * E
    at = place[:, None] + channel[None, :]
    valid = inside[:, None] & mask
    return tl.load(table + at, mask=valid, other=0.0).to(tl.float32), at, valid


@triton.jit
def _forward_kernel(
    table,
    places,  # (n, 2) x and y in cells
    firsts,  # (n,) row of the table of the point's image and group at cell 0
    weights,  # (n,)
    out,  # (n, E), added to
    num_points,
    height,
    width,
    groups,
    E: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    point = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    channel = tl.arange(0, BLOCK)
    exists = point < num_points
    mask = exists[:, None] & (channel < E)[None, :]
    column, fx = _address(tl.load(places + point * 2, mask=exists, other=0.0), width)
    row, fy = _address(tl.load(places + point * 2 + 1, mask=exists, other=0.0), height)
    first = tl.load(firsts + point, mask=exists, other=0)
    weight = tl.load(weights + point, mask=exists, other=0.0)
    a, _, _ = _load_corner(table, row, column, first, height, width, groups, channel, mask, E)
    b, _, _ = _load_corner(table, row, column + 1, first, height, width, groups, channel, mask, E)
    c, _, _ = _load_corner(table, row + 1, column, first, height, width, groups, channel, mask, E)
    d, _, _ = _load_corner(
        table, row + 1, column + 1, first, height, width, groups, channel, mask, E
    )
    upper = a * (1 - fx)[:, None] + b * fx[:, None]
    lower = c * (1 - fx)[:, None] + d * fx[:, None]
    value = (upper * (1 - fy)[:, None] + lower * fy[:, None]) * weight[:, None]
    at = point[:, None].to(tl.int64) * E + channel[None, :]
    tl.store(out + at, tl.load(out + at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def _backward_kernel(
    table,
    places,
    firsts,
    weights,
    grad_out,  # (n, E)
    grad_table,  # like table in float32, added to; not used without NEEDS_TABLE
    grad_places,  # (n, 2)
    grad_weights,  # (n,)
    num_points,
    height,
    width,
    groups,
    E: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEEDS_TABLE: tl.constexpr,
):
    point = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    channel = tl.arange(0, BLOCK)
    exists = point < num_points
    mask = exists[:, None] & (channel < E)[None, :]
    column, fx = _address(tl.load(places + point * 2, mask=exists, other=0.0), width)
    row, fy = _address(tl.load(places + point * 2 + 1, mask=exists, other=0.0), height)
    first = tl.load(firsts + point, mask=exists, other=0)
    weight = tl.load(weights + point, mask=exists, other=0.0)
    at = point[:, None].to(tl.int64) * E + channel[None, :]
    grad = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
    a, at_a, in_a = _load_corner(table, row, column, first, height, width, groups, channel, mask, E)
    b, at_b, in_b = _load_corner(
        table, row, column + 1, first, height, width, groups, channel, mask, E
    )
    c, at_c, in_c = _load_corner(
        table, row + 1, column, first, height, width, groups, channel, mask, E
    )
    d, at_d, in_d = _load_corner(
        table, row + 1, column + 1, first, height, width, groups, channel, mask, E
    )
    a_dot = tl.sum(a * grad, axis=1)
    b_dot = tl.sum(b * grad, axis=1)
    c_dot = tl.sum(c * grad, axis=1)
    d_dot = tl.sum(d * grad, axis=1)
    upper = a_dot * (1 - fx) + b_dot * fx
    lower = c_dot * (1 - fx) + d_dot * fx
    grad_x = ((b_dot - a_dot) * (1 - fy) + (d_dot - c_dot) * fy) * weight
    tl.store(grad_weights + point, upper * (1 - fy) + lower * fy, mask=exists)
    tl.store(grad_places + point * 2, grad_x, mask=exists)
    tl.store(grad_places + point * 2 + 1, (lower - upper) * weight, mask=exists)
    if NEEDS_TABLE:
        grad = grad * weight[:, None]
        tl.atomic_add(grad_table + at_a, grad * ((1 - fx) * (1 - fy))[:, None], mask=in_a)
        tl.atomic_add(grad_table + at_b, grad * (fx * (1 - fy))[:, None], mask=in_b)
        tl.atomic_add(grad_table + at_c, grad * ((1 - fx) * fy)[:, None], mask=in_c)
        tl.atomic_add(grad_table + at_d, grad * (fx * fy)[:, None], mask=in_d)


def _grid(num_points: int) -> tuple[int]:
    return (triton.cdiv(num_points, POINTS),)


class _GatherLevel(torch.autograd.Function):
    """Adds one level's share to the sampled features."""

    @staticmethod
    def forward(ctx, out, places, weights, token, table, firsts, size, groups, buffer):
        num_points, channels = out.shape
        _forward_kernel[_grid(num_points)](
            table, places, firsts, weights, out, num_points, *size, groups,
            E=channels, POINTS=POINTS, BLOCK=triton.next_power_of_2(channels),
        )  # fmt: skip
        ctx.save_for_backward(places, weights, table, firsts)
        ctx.size, ctx.groups, ctx.buffer = size, groups, buffer
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        places, weights, table, firsts = ctx.saved_tensors
        grad = grad.contiguous()
        num_points, channels = grad.shape
        grad_places, grad_weights = torch.empty_like(places), torch.empty_like(weights)
        needs_table = ctx.buffer is not None
        grad_table = ctx.buffer() if needs_table else table
        _backward_kernel[_grid(num_points)](
            table, places, firsts, weights, grad, grad_table, grad_places, grad_weights,
            num_points, *ctx.size, ctx.groups,
            E=channels, POINTS=POINTS, BLOCK=triton.next_power_of_2(channels),
            NEEDS_TABLE=needs_table,
        )  # fmt: skip
        token_grad = grad.new_zeros(()) if needs_table else None
        return grad, grad_places, grad_weights, token_grad, None, None, None, None, None


def gather_level(
    out: Tensor,
    places: Tensor,
    weights: Tensor,
    *,
    table: Tensor,
    firsts: Tensor,
    size: Sequence[int],
    groups: int,
    token: Tensor | None = None,
    buffer=None,
) -> Tensor:
    """Add the bilinear features of one level to ``out``, in place.

    Args:
        out: (n, e) float32.
        places: (n, 2) x and y in cells, 0 being the centre of the first; contiguous float32.
        weights: (n,) of the level, contiguous float32.
        table: (B H W G, e) of any floating type; sums are in float32.
        firsts: (n,) row of the table at cell 0 of the point's image and group.
        size: height and width of the map.
        groups: G.
        token, buffer: where a gradient of the table is wanted: a tensor that needs one, and a
            function that returns the float32 tensor to which it is added in the backward pass.

    Returns:
        ``out``.
    """
    return _GatherLevel.apply(
        out, places, weights, token, table, firsts, tuple(size), groups, buffer
    )
