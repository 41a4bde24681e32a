"""The base of parts that sample: where a query looks, and how much each feature level counts there.

Letters: B images, N queries, C channels, D numbers of a query's geometry, L levels, G groups, e =
channels of a group, P sampling points of a group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .feature_maps import FeatureMaps
from .sampling import SamplingPoints, sample_features

__all__ = ["SampledPoints", "SamplingModule"]


class SampledPoints(NamedTuple):
    """Where a sampling module has looked in one call."""

    xy: Tensor
    """(B, N, G, P, 2) pixels of the resized image."""
    level_weights: Tensor
    """(B, N, G, P, L) share of each level in each point; sums to 1."""
    boxes: Tensor
    """(B, N, 4) ``xyxy`` in pixels of the resized image, of the queries as they came."""


class SamplingModule(nn.Module):
    """Features of every query at points of its own.

    A subclass defines :meth:`points`, :meth:`boxes` and :meth:`level_weights`. Whoever wants to see
    them finds the module by its class, anywhere in a stage, and asks it for a :meth:`recording`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[SampledPoints] | None = None

    def points(self, queries: Tensor, geometry: Tensor) -> SamplingPoints:
        """Sampling points of (B, N, C) queries with (B, N, D) geometry."""
        raise NotImplementedError

    def boxes(self, geometry: Tensor) -> Tensor:
        """(B, N, 4) boxes, ``xyxy`` in pixels, of (B, N, D) geometry: what the points lie about."""
        raise NotImplementedError

    def level_weights(self, z: Tensor, strides: Sequence[int]) -> Tensor:
        """(..., L) share of each level in points of scale z (...)."""
        raise NotImplementedError

    def forward(self, queries: Tensor, geometry: Tensor, maps: FeatureMaps) -> Tensor:
        """
        Args:
            queries: (B, N, C).
            geometry: (B, N, D), no gradient needed.
            maps: L levels with C channels.

        Returns:
            (B, N, G, P, e).
        """
        points = self.points(queries, geometry)
        weights = self.level_weights(points.z, maps.strides)
        if self._recorded is not None:
            self._recorded.append(SampledPoints(points.xy, weights, self.boxes(geometry)))
        return sample_features(maps, points.xy, weights)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[SampledPoints]]:
        """The points of every call in the meantime, in a list that grows with them."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None
