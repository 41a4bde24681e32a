"""Multi-scale deformable attention (paper, section 4.1), and the layers around it.

Letters: B images, R sets of queries that look at each image, N queries, C channels, L levels,
G heads, P points of a head on each level.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import Execution, FeatureMaps, PointSampler, SampledPoints

from .heads import boxes_in_pixels
from .positions import map_sizes

__all__ = ["DeformableAttention", "FeedForward", "SelfAttention"]


class DeformableAttention(PointSampler):
    """Every head of a query looks at P points of its own on each level, around a reference."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        num_levels: int,
        num_points: int,
        execution: Execution | None = None,
    ):
        """
        Args:
            channels: C.
            num_heads: G.
            num_levels: L.
            num_points: P.
            execution: how to sample.

        Raises:
            UserError: C cannot be split into G heads.
        """
        super().__init__()
        if channels % num_heads:
            raise UserError(f"{channels} channels cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.execution = execution or Execution()
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(channels, 2 * samples)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The heads look in directions of their own, point p at a distance of p + 1 cells."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)
        places = direction[:, None, None] * distance[:, None]  # (G, 1, P, 2)
        places = places.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(places.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, queries: Tensor, references: Tensor, maps: FeatureMaps) -> Tensor:
        """
        Args:
            queries: (R B, N, C) with their position codes added.
            references: (R B, N, L, 2) points x, y, or (R B, N, L, 4) boxes cx, cy, w, h: on each
                level, as shares of the padded map. Offsets are cells for points, and for boxes
                halves of their sides divided by P.
            maps: what is attended to, L levels with C channels.

        Returns:
            (R B, N, C).
        """
        per_level = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*per_level, 2))
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1))
        weights = weights.softmax(-1).unflatten(-1, per_level[1:])  # (R B, N, G, L, P)
        cells = map_sizes(maps, references)
        center, sides = references[..., :2], references[..., 2:]
        step = sides * cells * (0.5 / self.num_points) if sides.shape[-1] else sides.new_ones(1, 1)
        center, step = (t[..., None, :, None, :] for t in (center * cells, step))
        places = center + offsets.to(references.dtype) * step  # (R B, N, G, L, P, 2)
        if self.is_recording:
            self.record(self._sampled(places / cells[:, None], weights, references, maps))
        x, y = places.movedim(3, 0).unbind(-1)
        values = self.values(maps).laid_out(self.execution, references.dtype)
        attended = values.sample_sum(x, y, weights.movedim(3, 0))
        return self.output_proj(attended.flatten(2))

    def _sampled(
        self, places: Tensor, weights: Tensor, references: Tensor, maps: FeatureMaps
    ) -> SampledPoints:
        """Of places (R B, N, G, L, P, 2) as shares of the padded maps, weights without the 2."""
        rows = places.shape[0] // maps.levels[0].shape[0]
        sizes = maps.image_sizes.flip(-1).to(places).repeat_interleave(rows, 0)  # w, h
        ratios = maps.valid_ratios.to(places).repeat_interleave(rows, 0)[:, None]  # (R B, 1, L, 2)
        xy = places / ratios[:, :, None, :, None] * sizes[:, None, None, None, None]
        about = references[:, :, 0] / ratios[:, :, 0].repeat(1, 1, references.shape[-1] // 2)
        about = F.pad(about, (0, 4 - about.shape[-1]))  # a point is a box of no size
        levels = torch.eye(self.num_levels, device=places.device, dtype=weights.dtype)
        levels = levels.repeat_interleave(self.num_points, 0)  # (L P, L)
        return SampledPoints(
            xy.flatten(3, 4),
            levels.expand(*weights.shape[:3], -1, -1),
            boxes_in_pixels(about, maps.image_sizes),
            weights.flatten(3),
        )

    def values(self, maps: FeatureMaps) -> FeatureMaps:
        """The maps' projections, zero on padding."""
        levels = []
        for level, mask in zip(maps.levels, maps.padding_masks):
            value = self.value_proj(level.permute(0, 2, 3, 1))
            levels.append(value.masked_fill(mask[..., None], 0).permute(0, 3, 1, 2))
        return replace(maps, levels=tuple(levels), sampler=None)  # which is of the old levels


class SelfAttention(nn.Module):
    """q <- LN(q + MHA(q + p, q + p, q)), p being the position codes."""

    def __init__(self, channels: int, num_heads: int, dropout: float):
        super().__init__()
        if channels % num_heads:
            raise UserError(f"{channels} channels cannot be split into {num_heads} heads")
        self.attention = nn.MultiheadAttention(
            channels, num_heads, dropout=dropout, batch_first=True
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)

    def forward(self, queries: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            queries, position: (B, N, C).
            mask: (N, N) or (B, N, N) bool: where a query may not look.

        Returns:
            (B, N, C).
        """
        return self.norm(self.before_norm(queries, position, mask))

    def before_norm(self, queries: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """q + MHA(q + p, q + p, q); arguments as of :meth:`forward`."""
        placed = queries + position
        if mask is not None and mask.dim() == 3:
            mask = mask.repeat_interleave(self.attention.num_heads, 0)
        attended, _ = self.attention(placed, placed, queries, attn_mask=mask, need_weights=False)
        return queries + self.dropout(attended)


class FeedForward(nn.Module):
    """x <- LN(x + W2 ReLU(W1 x))."""

    def __init__(self, channels: int, hidden_channels: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden_channels)
        self.linear2 = nn.Linear(hidden_channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.norm(self.before_norm(x))

    def before_norm(self, x: Tensor) -> Tensor:
        """x + W2 ReLU(W1 x)."""
        hidden = self.dropout(self.linear1(x).relu_())
        return x + self.dropout(self.linear2(hidden))
