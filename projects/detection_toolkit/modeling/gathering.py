"""Sampling by gathering: the same numbers as bilinear sampling level by level, in less time.

Maps are laid out with channels last, once for all stages; a point is then a weighted sum of short
contiguous rows, four of each level, and its gradient is added where it belongs in one buffer that
all stages share, instead of a map of zeros for every stage, level and call.

Letters: B images, N queries, L levels, G groups, e = channels of a group, P points of a group.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Variable

__all__ = ["GatheringSampler", "corner_rows"]


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
            fused: sample with one CUDA kernel a level (Triton), on a GPU.
        """
        self.fused = fused and _has_triton(levels[0].device)
        tables = [level.to(dtype).permute(0, 2, 3, 1).contiguous() for level in levels]
        compiling = torch.compiler.is_compiling()
        # (B, H_l, W_l, C) each. The gradient takes another path than through these.
        self.tables = tables if compiling else [table.detach() for table in tables]
        self._gradients: _MapGradients | None = None
        self._token: Tensor | None = None
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in levels)
        if needs_gradient and not compiling:
            self._gradients = _MapGradients(tables)
            self._token = _CollectGradients.apply(self._gradients, *tables)

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """See :meth:`~detection_toolkit.modeling.FeatureMaps.sample`."""
        shape, groups = x.shape[1:], x.shape[3]
        if self.fused and not torch.compiler.is_compiling():
            return self._sample_fused(x, y, weights).view(*shape, -1)
        rows, factors = self._rows_and_factors(x, y, weights)
        rows = rows.transpose(1, 2).contiguous()  # (L, n, 4)
        factors = factors.transpose(1, 2).contiguous()
        return self._gather(rows, factors, groups).view(*shape, -1)

    def sum(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """See :meth:`~detection_toolkit.modeling.FeatureMaps.sample_sum`."""
        shape, groups, num_points = x.shape[1:4], x.shape[3], x.shape[4]
        if self.fused and not torch.compiler.is_compiling():
            return self._sample_fused(x, y, weights).view(*x.shape[1:], -1).sum(-2)
        # All points of a group are one bag: rows and factors (L, R B N G, 4 P).
        rows, factors = (
            t.unflatten(-1, (-1, num_points)).transpose(1, 2).flatten(2)
            for t in self._rows_and_factors(x, y, weights)
        )
        return self._gather(rows, factors, groups).view(*shape, -1)

    def _rows_and_factors(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(L, 4, n) rows of the tables next to each point, and how much each counts."""
        rows, corners = corner_rows([table.shape for table in self.tables], x, y)
        return rows, corners * weights.to(corners.dtype).flatten(1)[:, None]

    def _gather(self, rows: Tensor, factors: Tensor, groups: int) -> Tensor:
        """(n, e) sums over all levels, of the rows (L, n, k) with their factors (L, n, k)."""
        sampled = None
        for table, row, factor in zip(self._rows(groups), rows, factors):
            values = F.embedding_bag(row, table, per_sample_weights=factor, mode="sum")
            sampled = values if sampled is None else sampled.add_(values)
        if self._token is not None:
            sampled = _SpreadGradient.apply(
                sampled, self._token, self._gradients, rows, factors.detach()
            )
        return sampled

    def _rows(self, groups: int) -> list[Tensor]:
        """The tables as rows (B H_l W_l G, e)."""
        return [table.view(-1, table.shape[-1] // groups) for table in self.tables]

    def _sample_fused(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        from .triton_sampling import gather_level

        groups = x.shape[3]
        shapes = [table.shape for table in self.tables]
        tables = self._rows(groups)
        places = torch.stack([x, y], dim=-1).float().flatten(1, -2) - 0.5  # (L, n, 2)
        weights = weights.float().flatten(1).contiguous()
        firsts = _first_rows(shapes, x).flatten(1)
        sampled = places.new_zeros(places.shape[1], tables[0].shape[-1])
        for i, table in enumerate(tables):
            sampled = gather_level(
                sampled,
                places[i],
                weights[i],
                table=table,
                firsts=firsts[i],
                size=shapes[i][1:3],
                groups=groups,
                token=self._token,
                buffer=None
                if self._gradients is None
                else partial(self._gradients.rows, i, table.shape[-1]),
            )
        return sampled.to(x.dtype)


class _MapGradients:
    """The gradients of the maps, as they are collected in a backward pass.

    An object of its own: what autograd's graph refers to must not refer to the graph, or each
    step's maps would live until Python looks for cycles.
    """

    def __init__(self, tables: Sequence[Tensor]):
        self._shapes = [table.shape for table in tables]
        self._dtype, self._device = tables[0].dtype, tables[0].device
        self._buffers: list[Tensor] | None = None

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros(x, dtype=self._dtype, device=self._device) for x in self._shapes]

    def rows(self, level: int, channels: int) -> Tensor:
        """The buffer (B H_l W_l G, e) of a level, which gradients are added to."""
        if self._buffers is None:
            self._buffers = self._zeros()
            # A backward pass that ends before it reaches the maps must leave nothing behind.
            Variable._execution_engine.queue_callback(self._forget)
        return self._buffers[level].view(-1, channels)

    def add(self, gradient: Tensor, rows: Tensor, factors: Tensor) -> None:
        """Add the gradient (n, e) of sampled values.

        Args:
            rows, factors: (L, n, k) which rows of the tables were summed, and how weighted.
        """
        for level, (row, factor) in enumerate(zip(rows, factors)):
            buffer = self.rows(level, gradient.shape[-1])
            for corner in range(row.shape[1]):
                buffer.index_add_(0, row[:, corner], gradient * factor[:, corner, None])

    def take(self) -> list[Tensor]:
        """The gradients (B, H_l, W_l, C) collected in this backward pass."""
        buffers = self._zeros() if self._buffers is None else self._buffers
        self._buffers = None
        return buffers

    def _forget(self) -> None:
        self._buffers = None


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
    heights, widths = (_filled([s[i] for s in shapes], x.device) for i in (1, 2))
    column, column_weight = _neighbours(x.flatten(1) - 0.5, widths)
    row, row_weight = _neighbours(y.flatten(1) - 0.5, heights)
    groups = x.shape[3]
    cell = row[:, :, None] * (widths * groups)[:, None, None, None] + column[:, None] * groups
    first = _first_rows(shapes, x).flatten(1)
    weights = row_weight[:, :, None] * column_weight[:, None]
    return cell.flatten(1, 2) + first[:, None], weights.flatten(1, 2)


def _first_rows(shapes: Sequence[torch.Size], x: Tensor) -> Tensor:
    """(L, R B, N, G, P) row of the tables at cell 0 of each point's image and group."""
    batch, groups = shapes[0][0], x.shape[3]
    rows_per_image = _filled([s[1] * s[2] * groups for s in shapes], x.device)
    image = torch.arange(batch, device=x.device).repeat_interleave(x.shape[1] // batch)
    first = image[:, None] * rows_per_image[:, None, None]  # (L, R B, 1)
    first = first + torch.arange(groups, device=x.device)  # (L, R B, G)
    return first[:, :, None, :, None].expand(x.shape)


def _filled(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as a tensor, made on the device: a copy would wait for all its work."""
    return torch.stack([torch.full((), n, dtype=torch.long, device=device) for n in numbers])


def _has_triton(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        logging.getLogger(__name__).warning(
            "model.execution.sampling=triton: Triton is not installed, which Linux wheels of "
            "PyTorch with CUDA bring along; sampling as with 'gather'"
        )
        return False
    return True


def _neighbours(place: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The two cells next to each place along one axis, and their linear weights.

    Args:
        place: (L, n) in cells, 0 being the centre of the first.
        sizes: (L,) cells of the axis.

    Returns:
        index (L, 2, n) within the axis, and weight (L, 2, n), zero where the cell is outside.
    """
    low = place.detach().floor()
    fraction = place - low
    # What is not a number stays so in the weights, but must not become an address.
    low = low.nan_to_num(0.0)
    cells = torch.stack([low, low + 1], dim=1)
    inside = torch.minimum(cells.clamp(min=0), (sizes - 1).to(place.dtype)[:, None, None])
    weights = torch.stack([1 - fraction, fraction], dim=1) * (cells == inside)
    return inside.long(), weights


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
