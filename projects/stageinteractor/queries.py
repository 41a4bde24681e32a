"""Initial queries: learned content, geometry of the whole image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.structures import box_to_xyzr

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

    def forward(self, image_sizes: Sequence[tuple[int, int]] | Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_sizes: (height, width) in pixels of each unpadded image; also as one (B, 2)
                tensor, which an exported graph takes as an input.

        Returns:
            (B, N, C) content, layer-normalised without affine, and (B, N, 4) xyzr.
        """
        weight = self.content.weight
        content = F.layer_norm(weight, weight.shape[-1:])
        if not isinstance(image_sizes, Tensor):
            # Traced by fvcore or torch.jit, Detectron2's sizes are a list of small tensors.
            image_sizes = torch.stack([torch.as_tensor(size) for size in image_sizes])
        sizes = image_sizes.to(weight)
        boxes = torch.cat([torch.zeros_like(sizes), sizes.flip(-1)], dim=-1)
        xyzr = box_to_xyzr(boxes)[:, None].expand(-1, self.num_queries, -1)
        return content.expand(boxes.shape[0], -1, -1), xyzr
