"""Feature maps for tests that need no backbone."""

from __future__ import annotations

import torch

from detection_toolkit.modeling import FeatureMaps


def make_maps(levels, strides, image_sizes=None) -> FeatureMaps:
    """Maps of a batch whose images, unless told otherwise, fill it."""
    if not levels:
        return FeatureMaps((), (), torch.ones(1, 2), (1, 1))
    size = tuple(int(side * strides[0]) for side in levels[0].shape[-2:])
    if image_sizes is None:
        image_sizes = [size] * len(levels[0])
    return FeatureMaps(tuple(levels), tuple(strides), torch.tensor(image_sizes), size)
