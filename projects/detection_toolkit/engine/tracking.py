"""Which detections of a video are the same object: ByteTrack, of the package ``trackers``.

ByteTrack (Zhang et al., 2022, https://arxiv.org/abs/2110.06864) predicts where each object will be
and matches boxes by their overlap, first the confident ones, then the others.
"""

from __future__ import annotations

import numpy as np
import torch
from detectron2.structures import Instances

from ..errors import MissingPackageError
from .detections import to_supervision

__all__ = ["Tracker"]

_LEAST_SCORE = 0.1  # ByteTrack's own: what is below it continues no track


class Tracker:
    """Gives the detections of successive frames the numbers of the objects that they show."""

    def __init__(self, *, frame_rate: float, threshold: float):
        """
        Args:
            frame_rate: of the video, in frames per second: an object that is not seen for a second
                is forgotten.
            threshold: least score of a detection with which a track begins. Those below continue
                one at most.

        Raises:
            MissingPackageError: ``trackers`` or ``supervision`` is missing.
        """
        try:
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise MissingPackageError(
                "tracking needs the packages supervision and trackers: pip install supervision "
                "rich, then pip install --no-deps trackers, as it requires another OpenCV "
                f"({error})"
            ) from error
        self._threshold = threshold
        self._tracker = ByteTrackTracker(
            frame_rate=frame_rate,
            track_activation_threshold=threshold,
            high_conf_det_threshold=threshold,
        )

    def update(self, instances: Instances) -> Instances:
        """The confident detections of the next frame, and those that continue a track.

        Args:
            instances: all of the frame, with ``pred_boxes``, ``scores`` and ``pred_classes``.

        Returns:
            on the CPU, in their order, with ``track_ids`` (D,) int64, from 0 on. It is -1 where an
            object is seen for the first time: a track is one of two frames at least.
        """
        instances = instances.to("cpu")
        instances = instances[instances.scores >= min(_LEAST_SCORE, self._threshold)]
        detections = to_supervision(instances)
        detections.data["index"] = np.arange(len(instances))
        tracked = self._tracker.update(detections)
        ids = torch.full((len(instances),), -1, dtype=torch.long)
        if len(tracked):
            ids[torch.from_numpy(tracked.data["index"])] = torch.from_numpy(tracked.tracker_id)
        instances.track_ids = ids
        return instances[(instances.scores >= self._threshold) | (ids >= 0)]
