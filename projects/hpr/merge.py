"""Merging what the refiners of a stage have found (paper, section 3.3).

Letters: C channels, F refiners, of which the primary one is the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError

__all__ = ["MERGES", "ChannelMerge", "FixedMerge", "Merge", "ScalarMerge"]


class Merge(nn.Module):
    """A weighted sum, whose weights nothing constrains.

    A subclass keeps ``weights`` (..., F).
    """

    weights: Tensor

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """F tensors (..., C) -> (..., C)."""
        first, *others = (self.weights[..., i] * x for i, x in enumerate(features))
        return sum(others, first)


class ChannelMerge(Merge):
    """A weight for each channel of each refiner, which is learned."""

    def __init__(self, start: Sequence[float] | None, channels: int, num_refiners: int):
        """
        Args:
            start: F weights that all channels begin with; None: they are drawn as matrices are.
            channels: C.
            num_refiners: F.

        Raises:
            UserError: another number of weights.
        """
        super().__init__()
        self.weights = nn.Parameter(torch.empty(channels, num_refiners))
        if start is None:
            nn.init.xavier_uniform_(self.weights)
        else:
            with torch.no_grad():
                self.weights.copy_(_checked(start, num_refiners))


class ScalarMerge(Merge):
    """One weight for each refiner, which is learned."""

    def __init__(self, start: Sequence[float], channels: int, num_refiners: int):
        """Arguments as of :class:`ChannelMerge`."""
        super().__init__()
        self.weights = nn.Parameter(_checked(start, num_refiners))


class FixedMerge(Merge):
    """One weight for each refiner, which stays."""

    def __init__(self, start: Sequence[float], channels: int, num_refiners: int):
        """Arguments as of :class:`ChannelMerge`."""
        super().__init__()
        self.register_buffer("weights", _checked(start, num_refiners))


MERGES = {"channel": ChannelMerge, "scalar": ScalarMerge, "fixed": FixedMerge}


def _checked(start: Sequence[float] | None, num_refiners: int) -> Tensor:
    if start is None or len(start) != num_refiners:
        raise UserError(
            f"model.decoder.merge_start must have {num_refiners} weights: of the primary refiner, "
            f"then of each auxiliary one; got {start}"
        )
    return torch.tensor([float(x) for x in start])
