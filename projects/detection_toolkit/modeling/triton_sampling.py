"""Sampling of all levels in one GPU kernel, with its backward pass (Triton).

Neighbours and weights are computed in registers, so that neither row numbers nor corner weights go
through memory. The plain form is :meth:`~detection_toolkit.modeling.FeatureMaps.sample`.

A *bag* is what is summed to one row of the result: K points on each of L levels. With K = 1 it is
one point, sampled on all levels; in deformable attention it is one head of a query.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gathering import Layout

__all__ = ["backward", "forward"]


_SHAPES = [(8, 1), (16, 1), (16, 2), (32, 2), (32, 4), (64, 4)]
if os.environ.get("TRITON_INTERPRET") == "1":
    _SHAPES = _SHAPES[-1:]  # there is no device to measure them on; fewest programs
_CONFIGS = [triton.Config({"BAGS": bags}, num_warps=warps) for bags, warps in _SHAPES]
_KEY = ["L", "K", "E"]
# They change with the image, and the kernels need not be compiled anew for that.
_SIZES = ["num_bags", "bags_per_image"]


@triton.jit
def _corner(table, row, column, first, height, width, groups, channel, mask, E: tl.constexpr):
    """Values (BAGS, E) of one neighbour, zero outside of the map; and where they lie."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = (first + (row * width + column) * groups) * E
    at = place[:, None] + channel[None, :]
    valid = inside[:, None] & mask
    return tl.load(table + at, mask=valid, other=0.0).to(tl.float32), at, valid


@triton.jit
def _cell(coordinates, at, exists):
    """Lower neighbour of a place along one axis, and how far the place is beyond it."""
    place = tl.load(coordinates + at, mask=exists, other=0.0).to(tl.float32) - 0.5
    low = tl.floor(place)
    return low.to(tl.int64), place - low


@triton.autotune(configs=_CONFIGS, key=_KEY)
@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    table,
    geometry,
    x,
    y,
    weights,
    out,  # (bags, E)
    num_bags,
    bags_per_image,
    bags_per_group,
    groups,
    x_level, x_bag, x_point,
    y_level, y_bag, y_point,
    w_level, w_bag, w_point,
    L: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BAGS: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    channel = tl.arange(0, BLOCK)
    exists = bag < num_bags
    mask = exists[:, None] & (channel < E)[None, :]
    image = bag // bags_per_image
    group = (bag // bags_per_group) % groups
    total = tl.zeros([BAGS, BLOCK], dtype=tl.float32)
    for level in range(L):
        before = tl.load(geometry + level * 4)
        cells = tl.load(geometry + level * 4 + 1)
        height = tl.load(geometry + level * 4 + 2)
        width = tl.load(geometry + level * 4 + 3)
        first = (before + image * cells) * groups + group
        for point in range(K):
            column, fx = _cell(x, level * x_level + bag * x_bag + point * x_point, exists)
            row, fy = _cell(y, level * y_level + bag * y_bag + point * y_point, exists)
            at = level * w_level + bag * w_bag + point * w_point
            weight = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
            a, _, _ = _corner(table, row, column, first, height, width, groups, channel, mask, E)
            b, _, _ = _corner(
                table, row, column + 1, first, height, width, groups, channel, mask, E
            )
            c, _, _ = _corner(
                table, row + 1, column, first, height, width, groups, channel, mask, E
            )
            d, _, _ = _corner(
                table, row + 1, column + 1, first, height, width, groups, channel, mask, E
            )
            upper = a * (1 - fx)[:, None] + b * fx[:, None]
            lower = c * (1 - fx)[:, None] + d * fx[:, None]
            total += (upper * (1 - fy)[:, None] + lower * fy[:, None]) * weight[:, None]
    tl.store(out + bag[:, None] * E + channel[None, :], total, mask=mask)


@triton.autotune(configs=_CONFIGS, key=[*_KEY, "NEEDS_TABLE"], restore_value=["grad_table"])
@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    table,
    geometry,
    x,
    y,
    weights,
    grad_out,  # (bags, E)
    grad_table,  # like table in float32, added to; not used without NEEDS_TABLE
    grad_x,  # (L, bags, K), like the next two
    grad_y,
    grad_weights,
    num_bags,
    bags_per_image,
    bags_per_group,
    groups,
    x_level, x_bag, x_point,
    y_level, y_bag, y_point,
    w_level, w_bag, w_point,
    L: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    NEEDS_TABLE: tl.constexpr,
    BAGS: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    channel = tl.arange(0, BLOCK)
    exists = bag < num_bags
    mask = exists[:, None] & (channel < E)[None, :]
    image = bag // bags_per_image
    group = (bag // bags_per_group) % groups
    whole = tl.load(grad_out + bag[:, None] * E + channel[None, :], mask=mask, other=0.0)
    for level in range(L):
        before = tl.load(geometry + level * 4)
        cells = tl.load(geometry + level * 4 + 1)
        height = tl.load(geometry + level * 4 + 2)
        width = tl.load(geometry + level * 4 + 3)
        first = (before + image * cells) * groups + group
        for point in range(K):
            column, fx = _cell(x, level * x_level + bag * x_bag + point * x_point, exists)
            row, fy = _cell(y, level * y_level + bag * y_bag + point * y_point, exists)
            at = level * w_level + bag * w_bag + point * w_point
            weight = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
            a, at_a, in_a = _corner(
                table, row, column, first, height, width, groups, channel, mask, E
            )
            b, at_b, in_b = _corner(
                table, row, column + 1, first, height, width, groups, channel, mask, E
            )
            c, at_c, in_c = _corner(
                table, row + 1, column, first, height, width, groups, channel, mask, E
            )
            d, at_d, in_d = _corner(
                table, row + 1, column + 1, first, height, width, groups, channel, mask, E
            )
            a_dot = tl.sum(a * whole, axis=1)
            b_dot = tl.sum(b * whole, axis=1)
            c_dot = tl.sum(c * whole, axis=1)
            d_dot = tl.sum(d * whole, axis=1)
            upper = a_dot * (1 - fx) + b_dot * fx
            lower = c_dot * (1 - fx) + d_dot * fx
            to_x = ((b_dot - a_dot) * (1 - fy) + (d_dot - c_dot) * fy) * weight
            place = (level * num_bags + bag) * K + point
            tl.store(grad_weights + place, upper * (1 - fy) + lower * fy, mask=exists)
            tl.store(grad_x + place, to_x, mask=exists)
            tl.store(grad_y + place, (lower - upper) * weight, mask=exists)
            if NEEDS_TABLE:
                grad = whole * weight[:, None]
                tl.atomic_add(grad_table + at_a, grad * ((1 - fx) * (1 - fy))[:, None], mask=in_a)
                tl.atomic_add(grad_table + at_b, grad * (fx * (1 - fy))[:, None], mask=in_b)
                tl.atomic_add(grad_table + at_c, grad * ((1 - fx) * fy)[:, None], mask=in_c)
                tl.atomic_add(grad_table + at_d, grad * (fx * fy)[:, None], mask=in_d)


def _grid(num_bags: int):
    return lambda meta: (triton.cdiv(num_bags, meta["BAGS"]),)


def _arguments(
    layout: Layout, channels: int, x: Tensor, y: Tensor, weights: Tensor
) -> tuple[tuple[int, ...], dict[str, int]]:
    """What both kernels take after their outputs, and their constants."""
    num_levels, num_bags, num_points = x.shape
    strides = [stride for t in (x, y, weights) for stride in t.stride()]
    numbers = (num_bags, layout.bags_per_image, layout.bags_per_group, layout.groups, *strides)
    constants = {
        "L": num_levels,
        "K": num_points,
        "E": channels,
        "BLOCK": triton.next_power_of_2(channels),
    }
    return numbers, constants


def forward(table: Tensor, layout: Layout, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear features over the points and levels of each bag.

    Args:
        table: (rows, e) of any floating type, contiguous.
        layout: of it.
        x, y: (L, bags, K) places in cells of each level, cell i reaching from i to i + 1; any
            strides and floating type, sums are in float32.
        weights: (L, bags, K).

    Returns:
        (bags, e) float32.
    """
    out = torch.empty(x.shape[1], table.shape[1], device=x.device)
    numbers, constants = _arguments(layout, table.shape[1], x, y, weights)
    _forward_kernel[_grid(x.shape[1])](
        table, layout.geometry, x, y, weights, out, *numbers, **constants
    )
    return out


def backward(
    table: Tensor,
    layout: Layout,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    *,
    grad: Tensor,
    grad_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        table, layout, x, y, weights: as in :func:`forward`.
        grad: (bags, e) of its result.
        grad_table: like the table, in float32: what the table's gradient is added to, in an order
            that changes from call to call; None where none is wanted.

    Returns:
        gradients (L, bags, K) of x, y and weights, float32.
    """
    grads = [torch.empty(x.shape, device=x.device) for _ in range(3)]
    numbers, constants = _arguments(layout, table.shape[1], x, y, weights)
    _backward_kernel[_grid(x.shape[1])](
        table,
        layout.geometry,
        x,
        y,
        weights,
        grad.float().contiguous(),
        table if grad_table is None else grad_table,
        *grads,
        *numbers,
        NEEDS_TABLE=grad_table is not None,
        **constants,
    )
    return tuple(grads)
