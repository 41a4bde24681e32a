"""Two-step sub-box sampling in the 3-D feature space (x, y, scale).

Letters: B images, N queries, L levels, G groups, e = channels of a group, P base points, Q
sub-points of a base point; PQ sampling points a group, in the order p-major, q-minor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import SamplingModule
from detection_toolkit.modeling.sampling import SamplingPoints

from .boxes import xyzr_to_box, xyzr_to_size

__all__ = ["SubBoxSampling", "level_weights"]


def level_weights(z: Tensor, scales: Sequence[float]) -> Tensor:
    """How much each feature level contributes to a point.

    Args:
        z: (...) log2 of the scale of each point.
        scales: L values of z, at which each level is met exactly.

    Returns:
        (..., L), softmax over l of -(z - scales_l)^2 / 2.
    """
    first = scales[0]
    if all(after - before == 1 for before, after in zip(scales, scales[1:])):
        level = torch.arange(len(scales), device=z.device, dtype=z.dtype)  # no copy to the device
    else:
        level = torch.tensor([s - first for s in scales], device=z.device, dtype=z.dtype)
    level = level.view(-1, *[1] * z.dim())
    return torch.softmax(-0.5 * (z - first - level) ** 2, dim=0).movedim(0, -1)


class SubBoxSampling(SamplingModule):
    """Adaptive sampling in two steps: base points in the box, sub-points around each.

    A base point moves by (dx0, dy0) box sizes and dz0 octaves; around it Q sub-points, shared by
    all groups and base points of the query, move by (dx1, dy1) of the sub-box, whose size is
    2^dz0 box sizes, and by dz1 octaves:

        x' = x + w (dx0 + 2^dz0 dx1),  y' = y + h (dy0 + 2^dz0 dy1),  z' = z + dz0 + dz1.
    """

    SCALE_OF_FIRST_LEVEL = 3.0  # z = 3, eight pixels, is met by the level of stride 4

    def __init__(self, channels: int, *, groups: int, base_points: int, sub_points: int):
        super().__init__()
        if channels % groups:
            raise UserError(f"{channels} channels cannot be split into {groups} groups")
        self.groups = groups
        self.base_points = base_points
        self.sub_points = sub_points
        self.base_offset = nn.Linear(channels, groups * base_points * 3)
        self.sub_offset = nn.Linear(channels, sub_points * 3)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.base_offset.weight)
        nn.init.zeros_(self.sub_offset.weight)
        base = self.base_offset.bias.view(self.groups * self.base_points, 3)
        nn.init.uniform_(base[:, :2], -0.5, 0.5)
        nn.init.zeros_(base[:, 2])
        # The first sub-point stays at the base point.
        sub = self.sub_offset.bias.view(self.sub_points, 3)
        nn.init.zeros_(sub)
        half = 0.5 / math.sqrt(2.0)
        nn.init.uniform_(sub[1:, :2], -half, half)

    def points(self, queries: Tensor, xyzr: Tensor) -> SamplingPoints:
        """Sampling points of (B, N, C) queries with (B, N, 4) geometry."""
        base = self.base_offset(queries).to(xyzr.dtype)
        sub = self.sub_offset(queries).to(xyzr.dtype)
        base = base.unflatten(-1, (self.groups, self.base_points, 1, 3))
        sub = sub.unflatten(-1, (1, 1, self.sub_points, 3))

        xyzr = xyzr[:, :, None, None, None]  # (B, N, 1, 1, 1, 4)
        size = xyzr_to_size(xyzr)
        base_xy = xyzr[..., :2] + base[..., :2] * size  # (B, N, G, P, 1, 2)
        sub_box_size = torch.exp2(base[..., 2:]) * size
        xy = base_xy + sub[..., :2] * sub_box_size  # (B, N, G, P, Q, 2)
        z = xyzr[..., 2] + base[..., 2] + sub[..., 2]
        return SamplingPoints(xy.flatten(3, 4), z.flatten(3, 4))

    def boxes(self, xyzr: Tensor) -> Tensor:
        """(B, N, 4) ``xyxy`` of (B, N, 4) geometry."""
        return xyzr_to_box(xyzr)

    def level_weights(self, z: Tensor, strides: Sequence[int]) -> Tensor:
        """(..., L) of (...) scales of points; the levels are counted, whatever their strides."""
        return level_weights(z, [self.SCALE_OF_FIRST_LEVEL + i for i in range(len(strides))])
