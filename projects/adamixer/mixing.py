"""Adaptive mixing of channels, then of points (AdaMixer, section 3.3).

Letters: B images, N queries, C channels, G groups, e = C / G, P sampling points, O output points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from stageinteractor import FilterBank
from stageinteractor.mixing import zero_weight_linear

__all__ = ["AdaptiveMixing"]


class AdaptiveMixing(nn.Module):
    """X <- ReLU(LN2(X M));  Y <- ReLU(LN2(S X));  q <- LN(q + Linear(Y)).

    M and S are generated from the query; LN2 normalises the last two dimensions jointly, without
    affine. Nothing is shared between stages.
    """

    def __init__(self, channels: int, *, groups: int, points: int, out_points: int):
        """
        Args:
            channels: C.
            groups: G.
            points: P.
            out_points: O.
        """
        super().__init__()
        if channels % groups:
            raise UserError(f"{channels} channels cannot be split into {groups} groups")
        per_group = channels // groups
        self.groups = groups
        self.num_points = points
        self.out_points = out_points
        self.filter_generator = zero_weight_linear(
            channels, groups * (per_group**2 + out_points * points)
        )
        self.channel_norm = nn.LayerNorm((points, per_group), elementwise_affine=False)
        self.spatial_norm = nn.LayerNorm((out_points, per_group), elementwise_affine=False)
        self.out_proj = nn.Linear(groups * out_points * per_group, channels)
        nn.init.xavier_uniform_(self.out_proj.weight)
        self.norm = nn.LayerNorm(channels)

    def generate(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Filters from (B, N, C) queries: M (B, N, G, e, e) and S (B, N, G, O, P)."""
        filters = self.filter_generator(queries).unflatten(-1, (self.groups, -1))
        spatial_size = self.out_points * self.num_points
        channel, spatial = filters.split([filters.shape[-1] - spatial_size, spatial_size], dim=-1)
        per_group = queries.shape[-1] // self.groups
        return (
            channel.unflatten(-1, (per_group, per_group)),
            spatial.unflatten(-1, (self.out_points, self.num_points)),
        )

    def forward(self, queries: Tensor, x: Tensor, bank: FilterBank) -> tuple[Tensor, FilterBank]:
        """
        Args:
            queries: (B, N, C) after self-attention.
            x: (B, N, G, P, e) sampled features.
            bank: returned as it is.

        Returns:
            (B, N, C) updated queries, and the bank.
        """
        channel, spatial = self.generate(queries)
        x = self.channel_norm(torch.matmul(x, channel)).relu()
        y = self.spatial_norm(torch.matmul(spatial, x)).relu()
        return self.norm(queries + self.out_proj(y.flatten(2))), bank
