"""Feature maps of a batch, with what is known of them.

Letters: B images, C channels, L levels, R sets of queries that look at each image, N queries,
G groups, e = C / G channels of a group, P points of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import constants
from .execution import Execution
from .gathering import GatheringSampler, has_triton, warn_without_triton

__all__ = ["FeatureMaps", "sample_by_grid"]


def _kept() -> Any:
    """A field for what is computed once when it is asked for. functools.cached_property would do,
    but before Python 3.12 it takes a lock, which torch.compile refuses."""
    return field(default=None, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class FeatureMaps:
    """L maps of a padded batch, finest first."""

    levels: tuple[Tensor, ...]
    """(B, C, H_l, W_l) each."""
    strides: tuple[int, ...]
    """Pixels of the image per cell of each map."""
    image_sizes: Tensor
    """(B, 2) heights and widths in pixels of the unpadded images."""
    padded_size: tuple[int, int]
    """Height and width in pixels of the batch. The maps need not divide it."""
    sampler: GatheringSampler | None = None
    """How :meth:`sample` and :meth:`sample_sum` compute; None: by :func:`sample_by_grid`."""
    _padding_masks: tuple[Tensor, ...] | None = _kept()
    _valid_ratios: Tensor | None = _kept()

    def laid_out(self, execution: Execution, dtype: torch.dtype) -> FeatureMaps:
        """The same maps, laid out once for all stages as ``execution.sampling`` wants them.

        Args:
            execution: how to compute.
            dtype: type of the coordinates; maps of lower precision are raised to it.
        """
        if execution.sampling == "grid" or self.sampler is not None:
            return self
        device = self.levels[0].device
        fused = (execution.sampling == "triton" and warn_without_triton(device)) or (
            execution.sampling == "auto" and dtype != torch.float64 and has_triton(device)
        )
        return replace(self, sampler=GatheringSampler(self.levels, dtype=dtype, fused=fused))

    def sample(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Bilinear features of every point, weighted and summed over the levels.

        Several sets of queries may look at each image: with R sets the points have R B rows,
        those of an image together (image 0 set 0, image 0 set 1, ...). The maps are never
        repeated.

        Args:
            x, y: (L, R B, N, G, P) places in cells of each level, cell i reaching from i to
                i + 1. Outside of a map its value is zero.
            weights: (L, R B, N, G, P).

        Returns:
            (R B, N, G, P, e).

        Raises:
            ValueError: the rows of the points are no multiple of B.
        """
        _check_rows(x.shape[1], self.levels)
        if self.sampler is not None:
            return self.sampler(x, y, weights)
        return sample_by_grid(self.levels, torch.stack([x, y], dim=-1), weights)

    def sample_sum(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Bilinear features, weighted and summed over the points of all levels.

        Every level has points of its own, as in deformable attention.

        Args:
            x, y, weights: (L, R B, N, G, P), as for :meth:`sample`.

        Returns:
            (R B, N, G, e).

        Raises:
            ValueError: the rows of the points are no multiple of B.
        """
        _check_rows(x.shape[1], self.levels)
        if self.sampler is not None:
            return self.sampler.sum(x, y, weights)
        places = torch.stack([x, y], dim=-1)
        return sample_by_grid(self.levels, places, weights).sum(dim=-2)

    @property
    def padding_masks(self) -> tuple[Tensor, ...]:
        """(B, H_l, W_l) bool of each level: True where a cell lies on padding.

        A cell takes the value of the nearest pixel, index floor(i * padded / cells) of each axis.
        """
        if self._padding_masks is None:
            object.__setattr__(self, "_padding_masks", self._make_padding_masks())
        return self._padding_masks

    @property
    def valid_ratios(self) -> Tensor:
        """(B, L, 2) share of each map, in x and in y, that is no padding."""
        if self._valid_ratios is None:
            object.__setattr__(self, "_valid_ratios", self._make_valid_ratios())
        return self._valid_ratios

    def _make_padding_masks(self) -> tuple[Tensor, ...]:
        heights, widths = self.image_sizes.to(self.levels[0].device)[:, :, None].unbind(1)
        masks = []
        for level in self.levels:
            rows, columns = (
                torch.arange(cells, device=level.device) * padded // cells
                for cells, padded in zip(level.shape[-2:], self.padded_size)
            )
            masks.append((rows >= heights)[:, :, None] | (columns >= widths)[:, None, :])
        return tuple(masks)

    def _make_valid_ratios(self) -> Tensor:
        return torch.stack(
            [
                torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1)
                for mask in self.padding_masks
            ],
            dim=1,
        )


def _check_rows(rows: int, levels: Sequence[Tensor]) -> None:
    batch = levels[0].shape[0]  # not len(): an export would take it for a constant
    if rows % batch:
        raise ValueError(f"points of {rows} sets of queries do not fit maps of {batch} images")


def sample_by_grid(
    levels: Sequence[Tensor], places: Sequence[Tensor] | Tensor, weights: Tensor
) -> Tensor:
    """:meth:`FeatureMaps.sample` step by step: ``grid_sample`` of one level after another.

    Args:
        levels: L maps (B, C, H_l, W_l).
        places: (R B, N, G, P, 2) x and y in cells of each level.
        weights: (L, R B, N, G, P).

    Raises:
        ValueError: the rows of the points are no multiple of B.
    """
    rows, num_queries, groups, num_points, _ = places[0].shape
    _check_rows(rows, levels)
    batch = levels[0].shape[0]
    # To the maps the sets of an image are one larger set, and the groups become part of the
    # batch: every group samples its own channels.
    together = (batch, rows // batch * num_queries, groups, num_points)
    weights = weights.reshape(len(levels), *together).transpose(2, 3).flatten(1, 2)
    sampled = None
    for level, xy, weight in zip(levels, places, weights):
        height, width = level.shape[-2:]
        size = constants((width, height), dtype=xy.dtype, device=xy.device)
        xy = xy.reshape(*together, 2).transpose(1, 2).flatten(0, 1)  # (B G, R N, P, 2)
        grid = (xy / size) * 2 - 1
        # Under autocast the maps rise to the precision of the coordinates, not the other way round.
        maps = level.reshape(batch * groups, -1, height, width).to(grid.dtype)
        values = F.grid_sample(
            maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        values = values * weight[:, None].to(values.dtype)  # (B G, e, R N, P)
        sampled = values if sampled is None else sampled + values
    sampled = sampled.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)  # (B, R N, G, P, e)
    return sampled.reshape(rows, num_queries, groups, num_points, -1)
