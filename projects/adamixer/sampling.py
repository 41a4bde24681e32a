"""Adaptive 3-D sampling: one set of points a group (AdaMixer, section 3.2).

Letters: B images, N queries, L levels, G groups, e = channels of a group, P points of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import SamplingModule
from detection_toolkit.modeling.sampling import SamplingPoints
from stageinteractor.boxes import xyzr_to_box, xyzr_to_size
from stageinteractor.sampling import level_weights

__all__ = ["AdaptiveSampling"]


class AdaptiveSampling(SamplingModule):
    """x' = x + w dx,  y' = y + h dy,  z' = z + dz, with w and h the size of the query's box."""

    def __init__(self, channels: int, *, groups: int, points: int):
        """
        Args:
            channels: C.
            groups: G.
            points: P.
        """
        super().__init__()
        if channels % groups:
            raise UserError(f"{channels} channels cannot be split into {groups} groups")
        self.groups = groups
        self.num_points = points
        self.offset = nn.Linear(channels, groups * points * 3)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Points uniform in the box, or on a regular grid if P is a square; one octave finer."""
        nn.init.zeros_(self.offset.weight)
        bias = self.offset.bias.view(self.groups, self.num_points, 3)
        side = math.isqrt(self.num_points)
        if side**2 == self.num_points:
            cell_centers = (torch.arange(side, dtype=bias.dtype) + 0.5) / side - 0.5
            bias[..., :2] = torch.cartesian_prod(cell_centers, cell_centers).to(bias.device)
        else:
            nn.init.uniform_(bias[..., :2], -0.5, 0.5)
        nn.init.constant_(bias[..., 2], -1.0)

    def points(self, queries: Tensor, xyzr: Tensor) -> SamplingPoints:
        """Sampling points of (B, N, C) queries with (B, N, 4) geometry."""
        offset = self.offset(queries).to(xyzr.dtype)
        offset = offset.unflatten(-1, (self.groups, self.num_points, 3))
        center = xyzr[:, :, None, None, :2]
        size = xyzr_to_size(xyzr)[:, :, None, None]
        return SamplingPoints(
            center + offset[..., :2] * size, xyzr[:, :, None, None, 2] + offset[..., 2]
        )

    def boxes(self, xyzr: Tensor) -> Tensor:
        """(B, N, 4) ``xyxy`` of (B, N, 4) geometry."""
        return xyzr_to_box(xyzr)

    def level_weights(self, z: Tensor, strides: Sequence[int]) -> Tensor:
        """(..., L), softmax over l of -(z - log2 stride_l)^2 / 2, of (...) scales of points."""
        return level_weights(z, [math.log2(stride) for stride in strides])
