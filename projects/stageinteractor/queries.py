"""Initial queries: learned content, geometry of the whole image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import FeatureMaps
from detection_toolkit.structures import Queries

from .boxes import box_to_xyzr

__all__ = ["InitialQueries"]


class InitialQueries(nn.Module):
    """N learned content vectors, the same for every image; every box is the whole image."""

    def __init__(self, num_queries: int, channels: int):
        super().__init__()
        if num_queries < 1:
            raise UserError(f"num_queries must be at least 1, got {num_queries}")
        self.content = nn.Embedding(num_queries, channels)
        nn.init.normal_(self.content.weight)

    @property
    def num_queries(self) -> int:
        """N."""
        return self.content.num_embeddings

    def forward(self, maps: FeatureMaps) -> Queries:
        """
        Args:
            maps: of B images, whose sizes alone are used.

        Returns:
            content (B, N, C), layer-normalised without affine, and geometry (B, N, 4) xyzr.
        """
        weight = self.content.weight
        content = F.layer_norm(weight, weight.shape[-1:])
        sizes = maps.image_sizes.to(weight)
        boxes = torch.cat([torch.zeros_like(sizes), sizes.flip(-1)], dim=-1)
        xyzr = box_to_xyzr(boxes)[:, None].expand(-1, self.num_queries, -1)
        return Queries(content.expand(boxes.shape[0], -1, -1), xyzr)
