"""Cascade dynamic mixing with cross-stage filter reuse (paper, Fig. 6).

Letters: B images, N queries, C channels, G groups, e = C / G, P base points, Q sub-points, PQ
sampling points, O output points, ``rows`` = spatial filters that the stage generates itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError

from .filter_bank import DynamicFilters, FilterBank

__all__ = [
    "CascadeDynamicMixing",
    "ChannelFilterAdapter",
    "SpatialFilterAdapter",
    "StaticMixing",
    "zero_weight_linear",
]


def zero_weight_linear(
    in_features: int, out_features: int, *, zero_bias: bool = False
) -> nn.Linear:
    """A linear layer that starts as a constant: weight 0, bias PyTorch's default or 0."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    if zero_bias:
        nn.init.zeros_(linear.bias)
    return linear


class StaticMixing(nn.Module):
    """Static mixing ahead of a reused channel filter: A + D.

    A mixes the base points and channels of each sub-point, D the sub-points and channels of each
    base point; the weights are shared by the groups.
    """

    def __init__(self, channels: int, *, base_points: int, sub_points: int):
        super().__init__()
        across_base = base_points * channels
        across_sub = sub_points * channels
        self.across_base_points = zero_weight_linear(across_base, across_base, zero_bias=True)
        self.across_sub_points = zero_weight_linear(across_sub, across_sub, zero_bias=True)
        self.base_points = base_points
        self.sub_points = sub_points

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, G, PQ, e) -> the same shape."""
        x = x.unflatten(-2, (self.base_points, self.sub_points))  # (..., P, Q, e)
        across_base = self.across_base_points(x.transpose(-3, -2).flatten(-2))
        across_base = across_base.unflatten(-1, (self.base_points, -1)).transpose(-3, -2)
        across_sub = self.across_sub_points(x.flatten(-2)).unflatten(-1, (self.sub_points, -1))
        return (across_base + across_sub).flatten(-3, -2)


class ChannelFilterAdapter(nn.Module):
    """Adapts channel filters of earlier stages to the current query.

    With gates r (rows) and c (columns) from the query and the stage's own filter M:

        M' = r M_j + (1 - r) M,   M'' = c M' + (1 - c) M,   X <- LN2(X M'' + b_j), ReLU.
    """

    def __init__(self, channels: int, *, groups: int, num_filters: int):
        super().__init__()
        self.groups = groups
        self.num_filters = num_filters
        per_group = channels // groups
        self.gates = zero_weight_linear(
            channels, groups * per_group * 2 * num_filters, zero_bias=True
        )
        self.bias = zero_weight_linear(channels, groups * num_filters * per_group)

    def gate_values(self, queries: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, G, e, 2, n) in (0, 1): [..., 0, j] columns, [..., 1, j] rows."""
        gates = self.gates(queries).sigmoid()
        return gates.unflatten(-1, (self.groups, -1, 2, self.num_filters))

    def forward(
        self, queries: Tensor, own: Tensor, reused: tuple[Tensor, ...]
    ) -> list[tuple[Tensor, Tensor]]:
        """
        Args:
            queries: (B, N, C).
            own: (B, N, G, e, e) the stage's own channel filter M.
            reused: n filters (B, N, G, e, e), oldest first.

        Returns:
            n pairs of adapted filter (B, N, G, e, e) and bias (B, N, G, 1, e).
        """
        column, row = self.gate_values(queries).unbind(-2)  # (B, N, G, e, n) each
        bias = self.bias(queries).unflatten(-1, (self.groups, self.num_filters, -1))
        adapted = []
        for j, banked in enumerate(reused):
            mixed = torch.lerp(own, banked, row[..., :, None, j])
            mixed = torch.lerp(own, mixed, column[..., None, :, j])
            adapted.append((mixed, bias[..., j, None, :]))
        return adapted


class SpatialFilterAdapter(nn.Module):
    """Adapts spatial filters of the stage before to the current query.

    With gates a (filters) and b (points) from the query and the stage's own filters Sp:

        V' = a V + (1 - a) Sp,   V'' = b V' + (1 - b) Sp.
    """

    def __init__(self, channels: int, *, groups: int, rows: int, num_points: int):
        super().__init__()
        self.groups = groups
        self.filter_gates = zero_weight_linear(channels, groups * rows, zero_bias=True)
        self.point_gates = zero_weight_linear(channels, groups * num_points, zero_bias=True)

    def gate_values(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> gates (B, N, G, rows) of the filters, (B, N, G, PQ) of the points."""
        a = self.filter_gates(queries).sigmoid().unflatten(-1, (self.groups, -1))
        b = self.point_gates(queries).sigmoid().unflatten(-1, (self.groups, -1))
        return a, b

    def forward(self, queries: Tensor, own: Tensor, reused: Tensor) -> Tensor:
        """(B, N, C), two filter sets (B, N, G, rows, PQ) -> (B, N, G, rows, PQ)."""
        a, b = self.gate_values(queries)
        mixed = torch.lerp(own, reused, a[..., :, None])
        return torch.lerp(own, mixed, b[..., None, :])


class CascadeDynamicMixing(nn.Module):
    """Mixes the sampled features of a query with filters generated from it, and with the adapted
    filters of earlier stages.

        X <- ReLU(LN2(X0 M + b_M));   reused channel filters, oldest first;
        Y <- ReLU(LN2(S X + b_S));    q <- LN(q + Linear(Y)),

    where LN2 normalises the last two dimensions jointly, without affine.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        base_points: int,
        sub_points: int,
        out_points: int,
        reused_channel_filters: int = 0,
        apply_reused_channel_filters: bool = True,
        reuse_spatial_filters: bool = False,
        mix_bias: bool = True,
    ):
        """
        Args:
            channels: C.
            groups: G.
            base_points, sub_points, out_points: P, Q, O.
            reused_channel_filters: how many of the newest bank entries lend their channel filter.
            apply_reused_channel_filters: False keeps the static mixing of each reused entry but
                leaves its filter out (an ablation of the authors).
            reuse_spatial_filters: the second half of the O spatial filters is adapted from the
                newest bank entry, the first half is generated.
            mix_bias: add generated biases in the stage's own channel and spatial mixing.
        """
        super().__init__()
        if channels % groups:
            raise UserError(f"{channels} channels cannot be split into {groups} groups")
        if reuse_spatial_filters and out_points % 2:
            raise UserError(f"spatial filter reuse halves out_points, which is odd: {out_points}")
        per_group = channels // groups
        num_points = base_points * sub_points
        rows = out_points // 2 if reuse_spatial_filters else out_points
        self.groups = groups
        self.base_points = base_points
        self.sub_points = sub_points
        self.out_points = out_points
        self.rows = rows
        self.num_reused = reused_channel_filters

        self.filter_generator = zero_weight_linear(
            channels, groups * (per_group**2 + rows * num_points)
        )
        self.bias_generator = (
            zero_weight_linear(channels, groups * (per_group + out_points)) if mix_bias else None
        )
        self.static_mixing = nn.ModuleList(
            StaticMixing(per_group, base_points=base_points, sub_points=sub_points)
            for _ in range(reused_channel_filters)
        )
        self.channel_adapter = (
            ChannelFilterAdapter(channels, groups=groups, num_filters=reused_channel_filters)
            if reused_channel_filters and apply_reused_channel_filters
            else None
        )
        self.spatial_adapter = (
            SpatialFilterAdapter(channels, groups=groups, rows=rows, num_points=num_points)
            if reuse_spatial_filters
            else None
        )
        self.channel_norm = nn.LayerNorm((num_points, per_group), elementwise_affine=False)
        self.spatial_norm = nn.LayerNorm((out_points, per_group), elementwise_affine=False)
        self.out_proj = zero_weight_linear(groups * out_points * per_group, channels)
        self.norm = nn.LayerNorm(channels)

    def generate(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's own filters: M (B, N, G, e, e) and Sp (B, N, G, rows, PQ)."""
        filters = self.filter_generator(queries).unflatten(-1, (self.groups, -1))
        spatial_size = self.rows * self.base_points * self.sub_points
        channel, spatial = filters.split([filters.shape[-1] - spatial_size, spatial_size], dim=-1)
        per_group = queries.shape[-1] // self.groups
        return (
            channel.unflatten(-1, (per_group, per_group)),
            spatial.unflatten(-1, (self.rows, -1)),
        )

    def generate_biases(self, queries: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Biases (B, N, G, 1, e) of the channel and (B, N, G, O, 1) of the spatial mixing."""
        if self.bias_generator is None:
            return 0.0, 0.0
        biases = self.bias_generator(queries).unflatten(-1, (self.groups, -1))
        channel, spatial = biases.split(
            [biases.shape[-1] - self.out_points, self.out_points], dim=-1
        )
        return channel[..., None, :], spatial[..., :, None]

    def mix_channels(
        self, x: Tensor, queries: Tensor, own: Tensor, bias: Tensor | float, bank: FilterBank
    ) -> Tensor:
        """Own channel filter, then the reused ones: (B, N, G, PQ, e) -> the same shape."""
        residual = x
        x = self.channel_norm(torch.matmul(x, own) + bias).relu()
        if not self.num_reused:
            return x
        reused = tuple(filters.channel for filters in bank.newest(self.num_reused))
        if self.channel_adapter is None:
            adapted = [None] * self.num_reused
        else:
            adapted = self.channel_adapter(queries, own, reused)
        for static_mixing, adapted_filter in zip(self.static_mixing, adapted):
            residual = x = static_mixing(x) + residual
            if adapted_filter is not None:
                x = torch.matmul(x, adapted_filter[0]) + adapted_filter[1]
            x = self.channel_norm(x).relu()
        return x

    def spatial_filters(self, queries: Tensor, own: Tensor, bank: FilterBank) -> Tensor:
        """(B, N, G, O, PQ) filters as applied: own rows, then adapted rows."""
        if self.spatial_adapter is None:
            return own
        banked = bank.newest(1)[0].spatial[..., : self.rows, :, :].flatten(-2)
        return torch.cat([own, self.spatial_adapter(queries, own, banked)], dim=-2)

    def mix_points(self, x: Tensor, spatial: Tensor, bias: Tensor | float) -> Tensor:
        """(B, N, G, PQ, e) points, (B, N, G, O, PQ) filters -> (B, N, C) change of the queries."""
        y = self.spatial_norm(torch.matmul(spatial, x) + bias).relu()
        return self.out_proj(y.flatten(2))

    def forward(self, queries: Tensor, x: Tensor, bank: FilterBank) -> tuple[Tensor, FilterBank]:
        """
        Args:
            queries: (B, N, C) after self-attention.
            x: (B, N, G, PQ, e) sampled features.
            bank: filters of earlier stages.

        Returns:
            (B, N, C) updated queries, and the bank with this stage's filters added.
        """
        own_channel, own_spatial = self.generate(queries)
        channel_bias, spatial_bias = self.generate_biases(queries)
        x = self.mix_channels(x, queries, own_channel, channel_bias, bank)
        spatial = self.spatial_filters(queries, own_spatial, bank)
        queries = self.norm(queries + self.mix_points(x, spatial, spatial_bias))
        deposited = spatial.unflatten(-1, (self.base_points, self.sub_points))
        return queries, bank.deposit(DynamicFilters(own_channel, deposited))
