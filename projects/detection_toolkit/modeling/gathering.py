"""Sampling by gathering: the same numbers as bilinear sampling level by level, in less time.

Maps are laid out with channels last, once for all stages; a point is then a weighted sum of short
contiguous rows, four of each level, and its gradient is added where it belongs in one buffer that
all stages share, instead of a map of zeros for every stage, level and call.

Letters: B images, N queries, L levels, G groups, e = channels of a group, PQ points a group.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Variable

__all__ = ["GatherableMaps", "corner_rows"]


class GatherableMaps(Sequence[Tensor]):
    """L feature maps that are sampled by gathering rows.

    It is the sequence of the maps, so that whatever takes maps takes it, too. Make one for a
    batch and hand it to all stages. A gradient flows to the maps; second derivatives do not.
    """

    def __init__(
        self, features: Sequence[Tensor], *, groups: int, dtype: torch.dtype, fused: bool = False
    ):
        """
        Args:
            features: L maps (B, C, H_l, W_l). Those in channels-last memory format and of the
                given type are not copied.
            groups: G; the channels of a group are sampled together.
            dtype: type of the coordinates; maps of lower precision are raised to it.
            fused: sample with one CUDA kernel a level (Triton), on a GPU.
        """
        self.features = tuple(features)
        self.groups = groups
        self.fused = fused and _has_triton(self.features[0].device)
        channels_last = [f.to(dtype).permute(0, 2, 3, 1).contiguous() for f in self.features]
        # (B H W G, e) each. The gradient takes another path than through these.
        self.tables = [
            x.view(-1, x.shape[-1] // groups)
            if torch.compiler.is_compiling()
            else x.detach().view(-1, x.shape[-1] // groups)
            for x in channels_last
        ]
        self._buffers: list[Tensor] | None = None
        self.needs_gradient = torch.is_grad_enabled() and any(
            f.requires_grad for f in self.features
        )
        self._token = None
        if self.needs_gradient and not torch.compiler.is_compiling():
            self._token = _CollectGradients.apply(self, *channels_last)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index):
        return self.features[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.features)

    def sample(self, strides: Sequence[int], xy: Tensor, weights: Tensor) -> Tensor:
        """Bilinear features of every point, weighted over the levels.

        Args:
            strides: pixels of the image per cell of each map.
            xy: (R B, N, G, PQ, 2) pixels; outside of a map its value is zero.
            weights: (R B, N, G, PQ, L).

        Returns:
            (R B, N, G, PQ, e).
        """
        shape = xy.shape[:-1]
        if self.fused and not torch.compiler.is_compiling():
            return self._sample_fused(strides, xy, weights).view(*shape, -1)
        rows, corners = corner_rows([f.shape for f in self.features], strides, xy)
        weights = weights.to(corners.dtype).flatten(0, -2).t()  # (L, n)
        factors = (corners * weights[:, None]).transpose(1, 2).contiguous()  # (L, n, 4)
        rows = rows.transpose(1, 2).contiguous()
        sampled = None
        for table, row, factor in zip(self.tables, rows, factors):
            values = F.embedding_bag(row, table, per_sample_weights=factor, mode="sum")
            sampled = values if sampled is None else sampled.add_(values)
        if self._token is not None:
            sampled = _SpreadGradient.apply(sampled, self._token, self, rows, factors.detach())
        return sampled.view(*shape, -1)

    def _sample_fused(self, strides: Sequence[int], xy: Tensor, weights: Tensor) -> Tensor:
        from .triton_sampling import gather_level

        shapes = [f.shape for f in self.features]
        places, weights = xy.float().flatten(0, -2), weights.float().flatten(0, -2)
        sampled = places.new_zeros(len(places), self.tables[0].shape[-1])
        firsts = _first_rows(shapes, xy).flatten(1)
        for i, (table, stride) in enumerate(zip(self.tables, strides)):
            sampled = gather_level(
                sampled,
                (places / stride - 0.5).contiguous(),
                weights[:, i].contiguous(),
                table=table,
                firsts=firsts[i],
                size=shapes[i][2:],
                groups=self.groups,
                token=self._token,
                buffer=None if self._token is None else partial(self._buffer, i),
            )
        return sampled.to(xy.dtype)

    def _buffer(self, level: int) -> Tensor:
        if self._buffers is None:
            self._buffers = [torch.zeros_like(table) for table in self.tables]
            # A backward pass that ends before it reaches the maps must leave nothing behind.
            Variable._execution_engine.queue_callback(self._forget)
        return self._buffers[level]

    def add_gradient(self, gradient: Tensor, rows: Tensor, factors: Tensor) -> None:
        """Add the gradient (n, e) of sampled values to that of the maps.

        Args:
            rows, factors: (L, n, 4) which rows of the tables were summed, and how weighted.
        """
        for level, (row, factor) in enumerate(zip(rows, factors)):
            buffer = self._buffer(level)
            for corner in range(row.shape[1]):
                buffer.index_add_(0, row[:, corner], gradient * factor[:, corner, None])

    def take_gradients(self) -> list[Tensor]:
        """The gradients (B, H_l, W_l, C) collected in this backward pass."""
        buffers = self._buffers or [torch.zeros_like(table) for table in self.tables]
        self._buffers = None
        shapes = [f.shape for f in self.features]
        return [x.view(b, h, w, c) for x, (b, c, h, w) in zip(buffers, shapes)]

    def _forget(self) -> None:
        self._buffers = None


def corner_rows(
    shapes: Sequence[torch.Size], strides: Sequence[int], xy: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the four neighbours of each point lie, and how much each counts.

    Args:
        shapes: (B, C, H_l, W_l) of the L maps.
        strides: pixels of the image per cell of each map.
        xy: (R B, N, G, PQ, 2) pixels.

    Returns:
        rows (L, 4, n) of tables (B H_l W_l G, e), n = R B N G PQ, and bilinear weights (L, 4, n),
        which are zero outside of the map.
    """
    # The points are innermost throughout: short inner dimensions are slow on every device.
    stride = xy.new_tensor(list(strides))[:, None]
    heights, widths = (torch.tensor([s[i] for s in shapes], device=xy.device) for i in (2, 3))
    x, y = xy.flatten(0, -2).unbind(-1)
    column, column_weight = _neighbours(x / stride - 0.5, widths)
    row, row_weight = _neighbours(y / stride - 0.5, heights)
    groups = xy.shape[2]
    cell = row[:, :, None] * (widths * groups)[:, None, None, None] + column[:, None] * groups
    first = _first_rows(shapes, xy).flatten(1)
    weights = row_weight[:, :, None] * column_weight[:, None]
    return cell.flatten(1, 2) + first[:, None], weights.flatten(1, 2)


def _first_rows(shapes: Sequence[torch.Size], xy: Tensor) -> Tensor:
    """(L, R B, N, G, PQ) row of the tables at cell 0 of each point's image and group."""
    batch, groups = shapes[0][0], xy.shape[2]
    rows_per_image = torch.tensor([s[2] * s[3] * groups for s in shapes], device=xy.device)
    image = torch.arange(batch, device=xy.device).repeat_interleave(xy.shape[0] // batch)
    first = image[:, None] * rows_per_image[:, None, None]  # (L, R B, 1)
    first = first + torch.arange(groups, device=xy.device)  # (L, R B, G)
    return first[:, :, None, :, None].expand(-1, *xy.shape[:-1])


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
    def forward(ctx, maps: GatherableMaps, *channels_last: Tensor) -> Tensor:
        ctx.maps = maps
        return channels_last[0].new_zeros(())

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, *ctx.maps.take_gradients()


class _SpreadGradient(torch.autograd.Function):
    """Passes sampled values on; in the backward pass, adds their gradient to that of the maps."""

    @staticmethod
    def forward(ctx, sampled, token, maps: GatherableMaps, rows: Tensor, factors: Tensor) -> Tensor:
        ctx.maps = maps
        ctx.save_for_backward(rows, factors)
        return sampled.view_as(sampled)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, factors = ctx.saved_tensors
        ctx.maps.add_gradient(gradient, rows, factors)
        return gradient, gradient.new_zeros(()), None, None, None
