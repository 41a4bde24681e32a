"""Sampling in the 3-D feature space (x, y, scale).

Letters: B images, N queries, L levels, G groups, e = channels of a group, P points of a group.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .constants import constants
from .feature_maps import FeatureMaps, sample_by_grid

__all__ = ["SamplingPoints", "sample_features"]


class SamplingPoints(NamedTuple):
    """Where a stage looks."""

    xy: Tensor
    """(B, N, G, P, 2) pixels of the resized image."""
    z: Tensor
    """(B, N, G, P) log2 of the scale that the point belongs to."""


def sample_features(maps: FeatureMaps, xy: Tensor, weights: Tensor) -> Tensor:
    """Bilinear features of every point on all levels, weighted over the levels.

    Args:
        maps: of B images.
        xy: (R B, N, G, P, 2) pixels; see :meth:`FeatureMaps.sample` for R sets of queries.
        weights: (R B, N, G, P, L).

    Returns:
        (R B, N, G, P, e).
    """
    weights = weights.movedim(-1, 0)
    if maps.sampler is None:
        return sample_by_grid(maps.levels, [xy / stride for stride in maps.strides], weights)
    strides = constants(maps.strides, dtype=xy.dtype, device=xy.device).view(-1, 1, 1, 1, 1)
    x, y = xy.unbind(-1)
    return maps.sample(x / strides, y / strides, weights)
