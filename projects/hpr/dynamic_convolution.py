"""Dynamic convolution (Sparse R-CNN): each query brings the filters for its own region.

Letters: n queries of all images, C channels, f channels of the inner layer.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["DynamicConvolution"]


class DynamicConvolution(nn.Module):
    """Two 1x1 convolutions of a region, whose filters the query makes."""

    def __init__(self, channels: int, *, inner_channels: int = 64, cells: int = 49):
        """
        Args:
            channels: C.
            inner_channels: f.
            cells: of a region.
        """
        super().__init__()
        self.inner_channels = inner_channels
        self.filters = nn.Linear(channels, 2 * channels * inner_channels)
        self.norm1 = nn.LayerNorm(inner_channels)
        self.norm2 = nn.LayerNorm(channels)
        self.out = nn.Linear(cells * channels, channels)
        self.out_norm = nn.LayerNorm(channels)
        for layer in (self.filters, self.out):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, content: Tensor, regions: Tensor) -> Tensor:
        """
        Args:
            content: (n, C) of the queries.
            regions: (n, cells, C) of their boxes.

        Returns:
            (n, C).
        """
        first, second = self.filters(content).chunk(2, dim=-1)
        first = first.unflatten(-1, (-1, self.inner_channels))  # (n, C, f)
        second = second.unflatten(-1, (self.inner_channels, -1))  # (n, f, C)
        x = self.norm1(regions.to(first.dtype) @ first).relu()
        x = self.norm2(x @ second).relu()
        return self.out_norm(self.out(x.flatten(1))).relu()
