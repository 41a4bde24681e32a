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

__all__ = ["PointSampler", "SampledPoints", "SamplingModule"]


class SampledPoints(NamedTuple):
    """Where a module has sampled in one call."""

    xy: Tensor
    """(B, N, G, P, 2) pixels of the resized image."""
    level_weights: Tensor
    """(B, N, G, P, L) share of each level in each point; sums to 1."""
    boxes: Tensor
    """(B, N, 4) ``xyxy`` in pixels of the resized image, of the queries as they came: what the
    points lie about. Of no size where that is a point."""
    shares: Tensor | None = None
    """(B, N, G, P) share of each point in the sum over the points of its group; None where they are
    not summed."""


class PointSampler(nn.Module):
    """A module that samples at points of its own for every query, and says where when asked.

    Whoever wants to see the points finds the module by this class, anywhere in a stage, and asks it
    for a :meth:`recording`. A subclass tells them to :meth:`record` in its forward pass, where it
    :attr:`is_recording`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[SampledPoints] | None = None

    @property
    def is_recording(self) -> bool:
        """Whether somebody wants to see the points."""
        return self._recorded is not None

    def record(self, points: SampledPoints) -> None:
        """Keep the points of a call, while somebody wants to see them."""
        if self._recorded is not None:
            self._recorded.append(points)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[SampledPoints]]:
        """The points of every call in the meantime, in a list that grows with them."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None


class SamplingModule(PointSampler):
    """Features of every query at points in the 3-D feature space.

    A subclass defines :meth:`points`, :meth:`boxes` and :meth:`level_weights`.
    """

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
        if self.is_recording:
            self.record(SampledPoints(points.xy, weights, self.boxes(geometry)))
        return sample_features(maps, points.xy, weights)
