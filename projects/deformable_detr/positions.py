"""Places in a batch of padded maps: tokens, cell centres, sine codes.

Letters: B images, C channels, L levels, T tokens, which are the cells of all levels, level by level
and row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detection_toolkit.modeling import FeatureMaps

__all__ = [
    "TEMPERATURE",
    "cell_centers",
    "coordinate_type",
    "map_sizes",
    "mask_positions",
    "sine_code",
    "to_maps",
    "to_tokens",
]

TEMPERATURE = 10000
"""Ratio of the longest to the shortest wavelength of a sine code."""


def to_tokens(levels: Sequence[Tensor]) -> Tensor:
    """L tensors (B, C, H_l, W_l) -> (B, T, C)."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def to_maps(tokens: Tensor, maps: FeatureMaps) -> FeatureMaps:
    """Tokens (B, T, C) as maps of the sizes of ``maps``, without a copy."""
    sizes = [level.shape[-2:] for level in maps.levels]
    parts = tokens.split([height * width for height, width in sizes], dim=1)
    levels = (
        part.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        for part, (height, width) in zip(parts, sizes)
    )
    return replace(maps, levels=tuple(levels), sampler=None)  # which is of the old levels


def map_sizes(maps: FeatureMaps, like: Tensor) -> Tensor:
    """(L, 2) cells of each map in x and in y, of the type of ``like``."""
    # Filled, not copied from numbers: an export would write those of its example down.
    return torch.stack(
        [
            torch.stack([like.new_full((), side) for side in level.shape[-2:][::-1]])
            for level in maps.levels
        ]
    )


def coordinate_type(maps: FeatureMaps) -> torch.dtype:
    """Of places in the maps: at least float32. Maps under autocast have 8 bits, too few to tell
    neighbouring cells apart."""
    return torch.promote_types(maps.levels[0].dtype, torch.float32)


def cell_centers(maps: FeatureMaps) -> Tensor:
    """(B, T, 2) centre x and y of every cell as shares of the unpadded image; more than 1 where a
    cell lies on padding."""
    centers = []
    dtype = coordinate_type(maps)
    sizes = map_sizes(maps, maps.levels[0].new_empty(0, dtype=dtype))
    for level, size, ratio in zip(maps.levels, sizes, maps.valid_ratios.unbind(1)):
        height, width = level.shape[-2:]
        y, x = (
            torch.arange(cells, device=level.device, dtype=dtype) + 0.5 for cells in (height, width)
        )
        center = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        cells = size * ratio.to(dtype)  # (B, 2)
        centers.append(center.flatten(0, 1) / cells[:, None])
    return torch.cat(centers, dim=1)


def sine_code(shares: Tensor, channels: int, temperature: float = TEMPERATURE) -> Tensor:
    """Sines and cosines of shares of an image.

    Args:
        shares: (...) values in [0, 1].
        channels: of the code, an even number; sine on even and cosine on odd places.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        (..., channels).
    """
    place = torch.arange(0, channels, 2, device=shares.device, dtype=shares.dtype)
    angle = 2 * math.pi * shares[..., None] / temperature ** (place / channels)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def mask_positions(
    padding_mask: Tensor,
    channels: int,
    dtype: torch.dtype,
    *,
    temperature: float = TEMPERATURE,
    offset: float = -0.5,
) -> Tensor:
    """Sine code of where a cell lies among those that are no padding.

    Args:
        padding_mask: (B, H, W) bool.
        channels: C, of which y fills the first half and x the second.
        dtype: of the code.
        temperature: of the sine code.
        offset: added to the count, which begins at 1; -0.5 for the centre of a cell.

    Returns:
        (B, C, H, W).
    """
    codes = []
    for axis in (1, 2):
        # Whole numbers: a sum of others may differ from call to call on a GPU.
        count = (~padding_mask).cumsum(axis).to(dtype)
        last = count.narrow(axis, -1, 1)
        codes.append(sine_code((count + offset) / (last + 1e-6), channels // 2, temperature))
    return torch.cat(codes, dim=-1).permute(0, 3, 1, 2)
