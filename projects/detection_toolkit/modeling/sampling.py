"""Sampling in the 3-D feature space (x, y, scale).

Letters: B images, N queries, L levels, G groups, e = channels of a group, PQ sampling
points a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gathering import GatherableMaps

__all__ = ["SamplingPoints", "sample_features"]


class SamplingPoints(NamedTuple):
    """Where a stage looks."""

    xy: Tensor
    """(B, N, G, PQ, 2) pixels of the resized image."""
    z: Tensor
    """(B, N, G, PQ) log2 of the scale that the point belongs to."""


def sample_features(
    features: Sequence[Tensor], strides: Sequence[int], points: SamplingPoints, weights: Tensor
) -> Tensor:
    """Bilinear features of every point, weighted over the levels.

    Several sets of queries may look at each image: with R sets the points have R B rows, those of
    an image together (image 0 set 0, image 0 set 1, ...). The maps are never repeated.

    Args:
        features: L maps (B, G e, H_l, W_l), of the padded batch.
        strides: pixels of the image per cell of each map.
        points: R B, N, G, PQ points. Outside of a map its value is zero.
        weights: (R B, N, G, PQ, L).

    Returns:
        (R B, N, G, PQ, e).

    Raises:
        ValueError: the rows of the points are no multiple of B.
    """
    rows, num_queries, groups, num_points, _ = points.xy.shape
    batch = features[0].shape[0]
    if rows % batch:
        raise ValueError(f"points of {rows} sets of queries do not fit maps of {batch} images")
    if isinstance(features, GatherableMaps):
        return features.sample(strides, points.xy, weights)
    # To the maps the sets of an image are one larger set.
    together = (batch, rows // batch * num_queries, groups, num_points)  # (B, R N, G, PQ)
    xy, weights = points.xy.reshape(*together, 2), weights.reshape(*together, len(features))
    # The groups become part of the batch: every group samples its own channels.
    xy = xy.transpose(1, 2).flatten(0, 1)  # (B G, R N, PQ, 2)
    weights = weights.permute(4, 0, 2, 1, 3).flatten(1, 2)  # (L, B G, R N, PQ)
    sampled = None
    for feature, stride, weight in zip(features, strides, weights):
        height, width = feature.shape[-2:]
        # Filled, not copied from numbers: an export would write those of its example down.
        extent = torch.stack([xy.new_full((), side * stride) for side in (width, height)])
        grid = (xy / extent) * 2 - 1
        # Under autocast the maps rise to the precision of the coordinates, not the other way round.
        maps = feature.reshape(batch * groups, -1, height, width).to(grid.dtype)
        values = F.grid_sample(
            maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        values = values * weight[:, None].to(values.dtype)  # (B G, e, R N, PQ)
        sampled = values if sampled is None else sampled + values
    sampled = sampled.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)  # (B, R N, G, PQ, e)
    return sampled.reshape(rows, num_queries, groups, num_points, -1)
