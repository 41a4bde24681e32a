"""Self-attention among the queries of an image, biased by how their boxes overlap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError

from .boxes import intersection_over_foreground, xyzr_to_box

__all__ = ["IoFBiasedSelfAttention", "geometry_embedding"]


def geometry_embedding(xyzr: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding of the query geometry.

    Args:
        xyzr: (..., 4).
        channels: C, a multiple of 8. Each of (x / 1000, y / 1000, z, r) fills C / 4 of them,
            sine on even and cosine on odd places.

    Returns:
        (..., C).
    """
    values = torch.cat([xyzr[..., :2] / 1000, xyzr[..., 2:]], dim=-1)
    per_value = channels // 4
    place = torch.arange(0, per_value, 2, device=xyzr.device, dtype=xyzr.dtype)
    frequency = 10000 ** (-place / per_value)
    angle = values[..., None] * frequency  # (..., 4, C / 8)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


class IoFBiasedSelfAttention(nn.Module):
    """q <- LN(u + MHA(u, u, u)) with u = q + embedding of the geometry.

    The attention logits of head h are biased by tau_h * log(IoF + 1e-7), tau learned, IoF the
    share of the attending query's box that the attended box covers. No gradient flows through
    the boxes. The residual contains the embedding.
    """

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        if channels % 8 or channels % num_heads:
            raise UserError(
                f"channels must be a multiple of 8 and of num_heads, got {channels} channels "
                f"and {num_heads} heads"
            )
        self.channels = channels
        self.num_heads = num_heads
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.tau = nn.Parameter(torch.empty(num_heads))
        self.norm = nn.LayerNorm(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.attention.out_proj.weight)
        nn.init.uniform_(self.tau, 0.0, 4.0)

    @torch.no_grad()
    def overlap(self, xyzr: Tensor) -> Tensor:
        """(B, N, 4) -> (B, N, N) log(IoF + 1e-7) of the attending (row) query's box."""
        return torch.log(intersection_over_foreground(xyzr_to_box(xyzr)) + 1e-7)

    def forward(self, queries: Tensor, xyzr: Tensor) -> Tensor:
        """(B, N, C) queries, (B, N, 4) xyzr -> (B, N, C)."""
        bias = self.tau[:, None, None] * self.overlap(xyzr)[:, None]  # (B, heads, N, N)
        queries = queries + geometry_embedding(xyzr, self.channels).to(queries.dtype)
        attended, _ = self.attention(
            queries,
            queries,
            queries,
            attn_mask=bias.flatten(0, 1).to(queries.dtype),
            need_weights=False,
        )
        return self.norm(queries + attended)
