"""Features of the region of interest that a query's box is: 7 x 7 cells of one map.

Which map, a rule of the box's size says, as in an FPN: level floor(log2(sqrt(area) / 56 + 1e-6)),
at least the first and at most the last. The 1e-6 stands within the logarithm, so that a box of no
area, whose logarithm would be infinite, is on the finest level. Detectron2's ``ROIPooler`` adds
1e-8 there, which is another level for sizes just below a threshold; so the rule stands here.

Each cell is the mean of 2 x 2 bilinear samples: torchvision's ``roi_align`` with ``aligned=True``.
Boxes are not clipped. A sample up to one cell outside of a map has the value of the map's border,
one farther outside is zero.

Letters: B images, R sets of queries that look at each image, N queries, C channels, L levels,
T tokens, which are the cells of all levels, n = R B N boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from deformable_detr.positions import to_tokens
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import Execution, FeatureMaps
from detection_toolkit.modeling.constants import constants

__all__ = ["FlatMaps", "RoIFeatures", "flat_maps"]


@dataclass(frozen=True)
class FlatMaps(FeatureMaps):
    """Maps that were laid out once for all stages."""

    tokens: Tensor | None = None
    """(B, T, C) all their cells, of the type of coordinates."""


def flat_maps(maps: FeatureMaps, dtype: torch.dtype) -> FlatMaps:
    """The same maps, with their cells in one table.

    Args:
        maps: L levels.
        dtype: of the table.
    """
    return FlatMaps(
        maps.levels,
        maps.strides,
        maps.image_sizes,
        maps.padded_size,
        tokens=to_tokens(maps.levels).to(dtype),
    )


class RoIFeatures(nn.Module):
    """RoIAlign on the level that the size of a box chooses; without parameters."""

    def __init__(
        self,
        *,
        finest_scale: float = 56.0,
        strides: Sequence[int] | None = None,
        size: int = 7,
        samples: int = 2,
        execution: Execution | None = None,
    ):
        """
        Args:
            finest_scale: pixels; boxes smaller than twice that are on the finest level.
            strides: pixels per cell that boxes are divided by; None: those of the maps.
            size: cells of a side.
            samples: of a cell along each side.
            execution: ``sampling="grid"`` for torchvision's ``roi_align`` of every level, anything
                else for one sum over rows of a table.

        Raises:
            UserError: no scale, or no positive stride.
        """
        super().__init__()
        if finest_scale <= 0 or min(strides or [1]) <= 0:
            raise UserError(
                f"model.decoder.finest_scale ({finest_scale}) and roi_strides ({strides}) must be "
                "above 0"
            )
        self.finest_scale = finest_scale
        self.strides = None if strides is None else tuple(strides)
        self.size = size
        self.samples = samples
        self.execution = execution or Execution()

    def levels(self, boxes: Tensor, num_levels: int) -> Tensor:
        """(..., 4) ``xyxy`` in pixels -> (...) long, the level of each box."""
        width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
        level = torch.log2((width * height).sqrt() / self.finest_scale + 1e-6).floor()
        # What is not a number must not become an address.
        return level.nan_to_num(0.0).clamp(0, num_levels - 1).long()

    def forward(self, boxes: Tensor, maps: FeatureMaps) -> Tensor:
        """
        Args:
            boxes: (R B, N, 4) ``xyxy`` in pixels, through which no gradient goes.
            maps: L levels with C channels; as :func:`flat_maps` returns them, which saves time,
                or plain.

        Returns:
            (R B, N, size^2, C), cells row by row.

        Raises:
            UserError: strides of another number of levels.
        """
        strides = self.strides or maps.strides
        if len(strides) != len(maps.levels):
            raise UserError(
                f"model.decoder.roi_strides has {len(strides)} strides, and there are "
                f"{len(maps.levels)} maps"
            )
        levels = self.levels(boxes, len(strides))
        if self.execution.sampling == "grid":
            return self._by_level(boxes, levels, maps, strides)
        return self._at_once(boxes, levels, maps, strides)

    def _by_level(
        self, boxes: Tensor, levels: Tensor, maps: FeatureMaps, strides: Sequence[int]
    ) -> Tensor:
        """As the equations are written: of every level, what is on it."""
        image = torch.arange(maps.levels[0].shape[0], device=boxes.device, dtype=boxes.dtype)
        image = image.repeat_interleave(boxes.shape[0] // image.shape[0])
        image = image[:, None, None].expand(-1, boxes.shape[1], 1)
        rois = torch.cat([image, boxes], dim=-1).flatten(0, 1)  # (n, 5)
        features = None
        for index, (level, stride) in enumerate(zip(maps.levels, strides)):
            aligned = roi_align(
                level.to(boxes.dtype), rois, self.size, 1 / stride, self.samples, aligned=True
            )
            chosen = (levels == index).flatten()[:, None, None, None]
            features = aligned if features is None else torch.where(chosen, aligned, features)
        return features.flatten(2).transpose(1, 2).unflatten(0, boxes.shape[:2])

    def _at_once(
        self, boxes: Tensor, levels: Tensor, maps: FeatureMaps, strides: Sequence[int]
    ) -> Tensor:
        """Every cell is a weighted sum of rows of the table of all cells of all images."""
        if not isinstance(maps, FlatMaps):
            maps = flat_maps(maps, boxes.dtype)
        with torch.no_grad():
            rows, weights = self._rows(boxes, levels, maps, strides)
        table = maps.tokens.flatten(0, 1)
        cells = F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
        return cells.view(*boxes.shape[:2], -1, table.shape[-1])

    def _rows(
        self, boxes: Tensor, levels: Tensor, maps: FlatMaps, strides: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """(n size^2, 4 samples^2) rows of (B T, C) that each cell sums, and their weights."""
        device, dtype = boxes.device, boxes.dtype
        batch, num_tokens = maps.tokens.shape[:2]
        shapes = [level.shape[-2:] for level in maps.levels]
        before = [0]
        for height, width in shapes[:-1]:
            before.append(before[-1] + height * width)
        heights, widths, starts = (
            constants(x, dtype=torch.long, device=device)[levels].flatten()
            for x in ([h for h, _ in shapes], [w for _, w in shapes], before)
        )
        stride = constants(strides, dtype=dtype, device=device)[levels]
        image = torch.arange(batch, device=device).repeat_interleave(boxes.shape[0] // batch)
        first = (image[:, None] * num_tokens).expand_as(levels).flatten() + starts
        x1, y1, x2, y2 = (boxes / stride[..., None]).flatten(0, 1).unbind(-1)
        column, column_weight = self._axis(x1, x2, widths)
        row, row_weight = self._axis(y1, y2, heights)
        row = row * widths[:, None, None] + first[:, None, None]
        rows = row[:, :, None, :, None] + column[:, None, :, None, :]
        weights = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]
        return rows.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)

    def _axis(self, low: Tensor, high: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Along one axis, where the samples of each cell lie between two rows or columns.

        Args:
            low, high: (n,) sides of the boxes, in cells of their maps.
            cells: (n,) of their maps along the axis.

        Returns:
            (n, size, 2 samples) indices within the map, and their weights, which are zero outside.
        """
        count = self.size * self.samples
        share = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
        place = low[:, None] - 0.5 + (high - low)[:, None] * share  # 0: centre of the first cell
        cells = cells[:, None]
        inside = (place >= -1) & (place <= cells)
        place = torch.minimum(place.clamp(min=0), (cells - 1).to(place.dtype))
        lower = place.floor()
        fraction = place - lower
        # What is not a number stays so in the weights.
        index = lower.nan_to_num(0.0).long()
        index = torch.stack([index, torch.minimum(index + 1, cells - 1)], dim=-1)
        weight = torch.stack([1 - fraction, fraction], dim=-1)
        weight = torch.where(inside[..., None] | weight.isnan(), weight, 0.0) / self.samples
        shape = (self.size, 2 * self.samples)
        return index.flatten(1).unflatten(1, shape), weight.flatten(1).unflatten(1, shape)
