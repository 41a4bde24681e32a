"""Sampling by gathering: the same numbers as bilinear sampling level by level, in less time.

Maps are laid out with channels last, once for all stages; a point is then a weighted sum of short
contiguous rows, four of each level, and its gradient is added where it belongs in one buffer that
all stages share, instead of a map of zeros for every stage, level and call.

Letters: B images, N queries, L levels, G groups, e = channels of a group, P points of a group.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

from .constants import constants

__all__ = [
    "GatheringSampler",
    "Layout",
    "corner_rows",
    "has_triton",
    "warn_without_triton",
]

_HALF = (torch.float16, torch.bfloat16)
# Of each level at a time, on a CPU: some megabytes of numbers.
_POINTS = 2**16


class Layout(NamedTuple):
    """Which rows of a table (rows, e) the fused kernel sums to one row of its result, a bag.

    The table has the cells of one level after another, of one image after another, G groups each.
    """

    geometry: Tensor
    """(L, 4) int64: cells of all images before the level, cells per image, height, width."""
    groups: int
    """G."""
    bags_per_image: int
    bags_per_group: int
    """Consecutive bags of one group; 1 if the groups alternate."""


class GatheringSampler:
    """Samples L feature maps by gathering rows.

    Make one for a batch and hand it to all stages. A gradient flows to the maps; second
    derivatives do not.
    """

    def __init__(self, levels: Sequence[Tensor], *, dtype: torch.dtype, fused: bool = False):
        """
        Args:
            levels: L maps (B, C, H_l, W_l). Those in channels-last memory format and of the given
                type are not copied.
            dtype: type of the coordinates; maps of lower precision are raised to it.
            fused: sample all levels with one kernel (Triton), in float32; see
                :func:`has_triton`. Not where the program is traced.
        """
        compiling = torch.compiler.is_compiling()
        maps = [level.permute(0, 2, 3, 1) for level in levels]
        self._shapes = [table.shape for table in maps]  # (B, H_l, W_l, C)
        # The gradient takes another path than through the tables.
        self._table: Tensor | None = None
        self.tables: list[Tensor] = []
        if fused and not compiling:
            self._table = _side_by_side(maps)
        else:
            maps = [table.to(dtype).contiguous() for table in maps]
            self.tables = maps if compiling else [table.detach() for table in maps]
        self._gradients: _MapGradients | None = None
        self._token: Tensor | None = None
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in levels)
        if needs_gradient and not compiling:
            self._gradients = _MapGradients(
                self._shapes,
                dtype=dtype if self._table is None else torch.float32,
                device=levels[0].device,
            )
            self._token = _CollectGradients.apply(self._gradients, *maps)

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """See :meth:`~detection_toolkit.modeling.FeatureMaps.sample`."""
        return self._in_pieces(x, y, weights, of_bag=1).unflatten(2, x.shape[3:])

    def sum(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """See :meth:`~detection_toolkit.modeling.FeatureMaps.sample_sum`."""
        return self._in_pieces(x, y, weights, of_bag=x.shape[4])

    def _in_pieces(self, x: Tensor, y: Tensor, weights: Tensor, *, of_bag: int) -> Tensor:
        """(R B, N, bags of a query, e)."""
        sampled = [
            self._sample(*piece, of_bag=of_bag).unflatten(0, (*piece[0].shape[1:3], -1))
            for piece in _pieces(x, y, weights)
        ]
        return sampled[0] if len(sampled) == 1 else torch.cat(sampled, dim=1)

    def _sample(self, x: Tensor, y: Tensor, weights: Tensor, *, of_bag: int) -> Tensor:
        """(bags, e), a bag being so many consecutive points, which are summed."""
        if self._table is not None:
            sampled = _FusedSample.apply(
                x, y, weights, self._token, self._table, self._shapes, of_bag, self._gradients
            )
            return sampled.to(x.dtype)
        rows, factors = _rows_and_factors(self._shapes, x, y, weights, of_bag=of_bag)
        sampled = None
        for table, row, factor in zip(self.tables, rows, factors):
            table = table.view(-1, table.shape[-1] // x.shape[3])  # (B H_l W_l G, e)
            values = F.embedding_bag(row, table, per_sample_weights=factor, mode="sum")
            sampled = values if sampled is None else sampled.add_(values)
        if self._token is not None:
            sampled = _SpreadGradient.apply(
                sampled, self._token, self._gradients, rows, factors.detach()
            )
        return sampled


def _pieces(x: Tensor, y: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The points (L, R B, N, G, P), on a CPU of so few queries at a time that what is computed of
    each stays in the cache until it is used."""
    points = x.shape[1] * x.shape[3] * x.shape[4]
    count = max(_POINTS // max(points, 1), 1)
    # In a program that is traced the number of pieces would be that of one image.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if x.device.type != "cpu" or traced or x.shape[2] <= count:
        return iter([(x, y, weights)])
    return zip(*(t.split(count, dim=2) for t in (x, y, weights)))


def _rows_and_factors(
    shapes: Sequence[torch.Size], x: Tensor, y: Tensor, weights: Tensor, *, of_bag: int
) -> tuple[Tensor, Tensor]:
    """(L, bags, k) rows of each level's table that a bag sums, and how much each counts."""
    rows, corners = corner_rows(shapes, x, y)
    factors = corners * weights.to(corners.dtype).flatten(1)[:, None]
    exchange = _exchange if torch.compiler.is_compiling() else _Exchange.apply
    return _exchange(rows, of_bag), exchange(factors, of_bag)


def _exchange(t: Tensor, of_bag: int) -> Tensor:
    """(L, k, bags of_bag) -> (L, bags, k of_bag): what belongs to a bag, side by side. It is its
    own inverse."""
    bags = t.shape[-1] // of_bag
    wide = _wide(t.dtype, of_bag)
    if wide == t.dtype:  # in a compiled program a view as the same type has no gradient either
        return t.unflatten(-1, (bags, -1)).transpose(1, 2).contiguous().flatten(2)
    exchanged = t.view(wide).unflatten(-1, (bags, -1)).transpose(1, 2)
    return exchanged.contiguous().flatten(2).view(t.dtype)


def _wide(dtype: torch.dtype, count: int) -> torch.dtype:
    """A type that holds several of ``count`` numbers at once, which are then moved as one: short
    inner dimensions are slow."""
    if torch.compiler.is_compiling():  # a compiler moves numbers as it likes
        return dtype
    wide = (torch.complex128, torch.complex64)
    return next((t for t in wide if count * dtype.itemsize % t.itemsize == 0), dtype)


class _Exchange(torch.autograd.Function):
    """:func:`_exchange` with a gradient, which a change of type has not."""

    @staticmethod
    def forward(ctx, t: Tensor, of_bag: int) -> Tensor:
        ctx.of_bag = of_bag
        return _exchange(t, of_bag)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _exchange(gradient.contiguous(), ctx.of_bag), None


def _side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """Copies of the maps (B, H_l, W_l, C), one behind the other in one row of numbers."""
    dtype = maps[0].dtype if maps[0].dtype in _HALF else torch.float32
    shapes = [table.shape for table in maps]
    whole = torch.empty(_numel(shapes), dtype=dtype, device=maps[0].device)
    for table, level in zip(_split(whole, shapes), maps):
        table.copy_(level.detach())
    return whole


def _numel(shapes: Sequence[torch.Size]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _split(whole: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of the shapes, one behind the other."""
    parts = whole.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def _layout(shapes: Sequence[torch.Size], x: Tensor, of_bag: int) -> Layout:
    """What the fused kernel needs to know of the maps and of the points x (L, R B, N, G, P)."""
    numbers, before = [], 0
    for batch, height, width, _ in shapes:
        numbers += [before, height * width, height, width]
        before += batch * height * width
    _, rows, num_queries, groups, num_points = x.shape
    bags_per_group = num_points // of_bag
    return Layout(
        geometry=constants(numbers, dtype=torch.long, device=x.device).view(-1, 4),
        groups=groups,
        bags_per_image=rows // shapes[0][0] * num_queries * groups * bags_per_group,
        bags_per_group=bags_per_group,
    )


class _MapGradients:
    """The gradients of the maps, as they are collected in a backward pass.

    An object of its own: what autograd's graph refers to must not refer to the graph, or each
    step's maps would live until Python looks for cycles.
    """

    def __init__(self, shapes: Sequence[torch.Size], *, dtype: torch.dtype, device: torch.device):
        """
        Args:
            shapes: (B, H_l, W_l, C) of the L maps.
            dtype, device: of what gradients are added to.
        """
        self._shapes = shapes
        self._dtype, self._device = dtype, device
        self._buffer: Tensor | None = None

    def _zeros(self) -> Tensor:
        return torch.zeros(_numel(self._shapes), dtype=self._dtype, device=self._device)

    def whole(self) -> Tensor:
        """The buffers of all levels, one behind the other; gradients are added to it."""
        if self._buffer is None:
            self._buffer = self._zeros()
            # A backward pass that ends before it reaches the maps must leave nothing behind.
            Variable._execution_engine.queue_callback(self._forget)
        return self._buffer

    def add(self, gradient: Tensor, rows: Tensor, factors: Tensor) -> None:
        """Add the gradient (n, e) of sampled values.

        Args:
            rows, factors: (L, n, k) which rows of the tables were summed, and how weighted.
        """
        for buffer, row, factor in zip(_split(self.whole(), self._shapes), rows, factors):
            buffer, row = buffer.view(-1, gradient.shape[-1]), row.long()
            for corner in range(row.shape[1]):
                buffer.index_add_(0, row[:, corner], gradient * factor[:, corner, None])

    def take(self) -> list[Tensor]:
        """The gradients (B, H_l, W_l, C) collected in this backward pass."""
        buffer = self._zeros() if self._buffer is None else self._buffer
        self._buffer = None
        return _split(buffer, self._shapes)

    def _forget(self) -> None:
        self._buffer = None


def corner_rows(shapes: Sequence[torch.Size], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where the four neighbours of each point lie, and how much each counts.

    Args:
        shapes: (B, H_l, W_l, C) of the L maps.
        x, y: (L, R B, N, G, P) places in cells, cell i reaching from i to i + 1.

    Returns:
        rows (L, 4, n) of tables (B H_l W_l G, e), n = R B N G P, and bilinear weights (L, 4, n),
        which are zero outside of the map.
    """
    # The points are innermost throughout: short inner dimensions are slow on every device.
    index = _index_type(shapes)
    heights, widths = (
        constants([s[i] for s in shapes], dtype=index, device=x.device) for i in (1, 2)
    )
    column, column_weight = _neighbours(x.flatten(1) - 0.5, widths)
    row, row_weight = _neighbours(y.flatten(1) - 0.5, heights)
    groups = x.shape[3]
    row = row * (widths * groups)[:, None, None] + _first_rows(shapes, x).flatten(1)[:, None]
    rows = row[:, :, None] + (column * groups)[:, None]
    weights = row_weight[:, :, None] * column_weight[:, None]
    return rows.flatten(1, 2), weights.flatten(1, 2)


def _index_type(shapes: Sequence[torch.Size]) -> torch.dtype:
    """Four bytes per number, where they do and sizes are known; they are kept for backward."""
    if torch.compiler.is_compiling() or any(type(n) is not int for s in shapes for n in s):
        return torch.long
    return torch.int if max(map(math.prod, shapes)) < 2**31 else torch.long


def _first_rows(shapes: Sequence[torch.Size], x: Tensor) -> Tensor:
    """(L, R B, N, G, P) row of the tables at cell 0 of each point's image and group."""
    batch, groups = shapes[0][0], x.shape[3]
    dtype, device = _index_type(shapes), x.device
    rows_per_image = constants([s[1] * s[2] * groups for s in shapes], dtype=dtype, device=device)
    image = torch.arange(batch, dtype=dtype, device=device)
    image = image.repeat_interleave(x.shape[1] // batch)
    first = image[:, None] * rows_per_image[:, None, None]  # (L, R B, 1)
    first = first + torch.arange(groups, dtype=dtype, device=device)  # (L, R B, G)
    return first[:, :, None, :, None].expand(x.shape)


def has_triton(device: torch.device) -> bool:
    """Whether the fused kernel can run on the device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def warn_without_triton(device: torch.device) -> bool:
    """:func:`has_triton`; with a warning if a GPU lacks no more than the package."""
    found = has_triton(device)
    if device.type == "cuda" and not found:
        logging.getLogger(__name__).warning(
            "model.execution.sampling=triton: Triton is not installed, which Linux wheels of "
            "PyTorch with CUDA bring along; sampling as with 'gather'"
        )
    return found


def _neighbours(place: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The two cells next to each place along one axis, and their linear weights.

    Args:
        place: (L, n) in cells, 0 being the centre of the first.
        sizes: (L,) cells of the axis.

    Returns:
        index (L, 2, n) within the axis, of the type of the sizes, and weight (L, 2, n), zero
        where the cell is outside.
    """
    low = place.detach().floor()
    fraction = place - low
    # What is not a number stays so in the weights, but must not become an address.
    low = low.nan_to_num(0.0)
    cells = torch.stack([low, low + 1], dim=1)
    last = (sizes - 1).to(place.dtype)[:, None, None]
    inside = cells.clamp(min=torch.zeros_like(last), max=last)
    weights = torch.stack([1 - fraction, fraction], dim=1) * (cells == inside)
    return inside.to(sizes.dtype), weights


class _CollectGradients(torch.autograd.Function):
    """Stands between the maps and a token on which every sampling depends: its backward runs
    after theirs, when the gradient of the maps is complete."""

    @staticmethod
    def forward(ctx, gradients: _MapGradients, *tables: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tables[0].new_zeros(())

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, *ctx.gradients.take()


class _SpreadGradient(torch.autograd.Function):
    """Passes sampled values on; in the backward pass, adds their gradient to that of the maps."""

    @staticmethod
    def forward(
        ctx, sampled, token, gradients: _MapGradients, rows: Tensor, factors: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(rows, factors)
        return sampled.view_as(sampled)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, factors = ctx.saved_tensors
        ctx.gradients.add(gradient, rows, factors)
        return gradient, gradient.new_zeros(()), None, None, None


class _FusedSample(torch.autograd.Function):
    """Sampling of all levels in one kernel; gradients of the maps go where they are collected."""

    @staticmethod
    def forward(ctx, x, y, weights, token, table, shapes, of_bag, gradients) -> Tensor:
        from . import triton_sampling

        ctx.save_for_backward(x, y, weights, table)
        ctx.shapes, ctx.of_bag, ctx.gradients = shapes, of_bag, gradients
        layout = _layout(shapes, x, of_bag)
        table = table.view(-1, shapes[0][-1] // layout.groups)
        return triton_sampling.forward(table, layout, *_bags(x, y, weights, of_bag))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        from . import triton_sampling

        x, y, weights, table = ctx.saved_tensors
        gradient, gradients = gradient.float(), ctx.gradients
        # What the kernel adds, it adds in whatever order the device reaches it.
        in_order = torch.are_deterministic_algorithms_enabled()
        to_points = triton_sampling.backward(
            table.view(-1, gradient.shape[-1]),
            _layout(ctx.shapes, x, ctx.of_bag),
            *_bags(x, y, weights, ctx.of_bag),
            grad=gradient,
            grad_table=None if gradients is None or in_order else gradients.whole(),
        )
        if gradients is not None and in_order:
            terms = _rows_and_factors(
                ctx.shapes, x.float(), y.float(), weights.float(), of_bag=ctx.of_bag
            )
            gradients.add(gradient, *terms)
        to_token = None if gradients is None else gradient.new_zeros(())
        points = zip(to_points, (x, y, weights))
        return *(g.view_as(t).to(t.dtype) for g, t in points), to_token, *[None] * 4


def _bags(x: Tensor, y: Tensor, weights: Tensor, of_bag: int) -> tuple[Tensor, Tensor, Tensor]:
    """(L, R B, N, G, P) each -> (L, bags, K), without a copy where strides allow."""
    x, y, weights = (t.reshape(t.shape[0], -1, of_bag) for t in (x, y, weights))
    return x, y, weights
