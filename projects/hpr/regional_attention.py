"""Regional cross-attention: samples of each query attend to the cells of its own region.

Letters: n queries of all images, S samples of a query, C channels, H heads, d = C / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.positions import mask_positions
from detection_toolkit.modeling import Execution

__all__ = ["RegionalCrossAttention"]

TEMPERATURE = 20
"""Of the sine codes of the cells."""


class RegionalCrossAttention(nn.Module):
    """S samples of a query attend to its region; only the keys know where a cell lies."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 8,
        num_samples: int = 5,
        size: int = 7,
        execution: Execution | None = None,
    ):
        """
        Args:
            channels: C, a multiple of 4.
            num_heads: H.
            num_samples: S.
            size: cells of a region's side.
            execution: ``mixing="direct"`` to write keys and values of all cells out; with
                ``"factored"`` their projections are applied to the samples, which are fewer.
        """
        super().__init__()
        self.num_samples = num_samples
        self.execution = execution or Execution()
        self.samples = nn.Linear(channels, num_samples * channels)
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.out = nn.Linear(num_samples * channels, channels)
        self.out_norm = nn.LayerNorm(channels)
        for layer in (self.samples, self.attention.out_proj, self.out):
            nn.init.xavier_uniform_(layer.weight)
        cells = torch.zeros(1, size, size, dtype=torch.bool)
        code = mask_positions(cells, channels, torch.float64, temperature=TEMPERATURE, offset=0.0)
        self.register_buffer("key_position", code[0].flatten(1).t().float(), persistent=False)

    def forward(self, content: Tensor, regions: Tensor) -> Tensor:
        """
        Args:
            content: (n, C) of the queries.
            regions: (n, cells, C) of their boxes.

        Returns:
            (n, C).
        """
        samples = self.samples(content).unflatten(-1, (self.num_samples, -1))  # (n, S, C)
        regions = regions.to(samples.dtype)
        if self.execution.mixing == "direct":
            keys = regions + self.key_position.to(regions.dtype)
            attended, _ = self.attention(samples, keys, regions, need_weights=False)
        else:
            attended = self._factored(samples, regions)
        return self.out_norm(self.out(attended.flatten(1))).relu()

    def _factored(self, samples: Tensor, regions: Tensor) -> Tensor:
        """(n, S, C) what ``attention`` makes of them, without keys and values.

        With q a sample's query and W_k, W_v the rows of a head,

            q (W_k r + b_k) = (q W_k) r + q b_k
            sum_j a_j (W_v r_j + b_v) = W_v sum_j a_j r_j + b_v

        as the a_j sum to 1; q b_k is the same for all cells of a sample, and so without effect.
        """
        heads = self.attention.num_heads
        found = (self._weights(samples, regions) @ regions).unflatten(1, (-1, heads))
        to_value = self.attention.in_proj_weight.chunk(3)[2].unflatten(0, (heads, -1))
        values = torch.einsum("nshc,hdc->nshd", found, to_value)  # of (n, S, H, C)
        bias = self.attention.in_proj_bias.chunk(3)[2]
        return self.attention.out_proj(values.flatten(2) + bias)

    def weights(self, content: Tensor, regions: Tensor) -> Tensor:
        """(n, S, H, cells) how much each head of each sample takes of each cell; arguments as of
        :meth:`forward`."""
        samples = self.samples(content).unflatten(-1, (self.num_samples, -1))
        weights = self._weights(samples, regions.to(samples.dtype))
        return weights.unflatten(1, (self.num_samples, -1))

    def _weights(self, samples: Tensor, regions: Tensor) -> Tensor:
        """(n, S H, cells), of samples (n, S, C)."""
        heads, channels = self.attention.num_heads, self.attention.embed_dim
        to_query, to_key, _ = self.attention.in_proj_weight.chunk(3)
        bias = self.attention.in_proj_bias.chunk(3)[0]
        query = F.linear(samples, to_query, bias) * (channels // heads) ** -0.5
        query = query.unflatten(-1, (heads, -1))  # (n, S, H, d)
        query = torch.einsum("nshd,hdc->nshc", query, to_key.unflatten(0, (heads, -1)))
        query = query.flatten(1, 2)  # (n, S H, C)
        scores = query @ regions.transpose(1, 2) + query @ self.key_position.to(query.dtype).t()
        return scores.softmax(-1)
