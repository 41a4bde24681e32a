"""The values that cross from one package to another.

Letters: B images, N queries, S stages, K classes, C channels, M objects (padded to the most in one
image of the batch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Assignment",
    "Branch",
    "ClassTargets",
    "GroundTruth",
    "HeadOutput",
    "Predictions",
    "Queries",
    "StageOutput",
]


class Queries(NamedTuple):
    """The queries of a batch, as a stage takes and leaves them."""

    content: Tensor
    """(B, N, C)."""
    geometry: Tensor
    """(B, N, D) boxes in the decoder's own code, which nothing else looks into."""
    position: Tensor | None = None
    """(B, N, C) position code, where it is no function of the geometry."""
    attention_mask: Tensor | None = None
    """(N, N) or (B, N, N) bool: True where a query (row) may not look at another (column)."""
    kinds: tuple[int, ...] | None = None
    """How many queries there are of each kind, which stand one kind after another; None: one kind.
    Their meaning is the decoder's own."""


class HeadOutput(NamedTuple):
    """What one prediction head says of a set of queries."""

    logits: Tensor
    """(B, N, K) class logits."""
    boxes: Tensor
    """(B, N, 4) ``xyxy`` in pixels of the resized, unpadded image."""
    active: Tensor | None = None
    """(B, N) bool: queries that count, as detections and in losses; None: all."""


class StageOutput(NamedTuple):
    """What one decoder stage predicts."""

    logits: Tensor
    """(B, N, K) class logits."""
    boxes: Tensor
    """(B, N, 4) refined boxes, ``xyxy`` in pixels of the resized, unpadded image."""
    queries: Queries
    """The queries after the stage, with the refined geometry."""
    auxiliary: Mapping[str, HeadOutput] | None = None
    """Predictions of the stage's further heads, which training alone uses, by their names."""
    active: Tensor | None = None
    """(B, N) bool: queries that count, as detections and in losses; None: all."""


class Branch(NamedTuple):
    """A set of predictions that is supervised beside the stages: encoder, denoising, ..."""

    name: str
    """Part of the names of its losses, and which criterion it has."""
    outputs: Sequence[HeadOutput | StageOutput]
    """Of its stages; N may be 0, where a batch gives it no queries."""
    assignment: Assignment | None = None
    """Where it is given with the queries; None: the criterion matches."""


class Predictions(NamedTuple):
    """All that a detector predicts for a batch."""

    stages: Sequence[StageOutput]
    """Of the S stages; the last is the answer."""
    branches: tuple[Branch, ...] = ()
    """What else is supervised; empty but in training."""


class GroundTruth(NamedTuple):
    """The objects of a batch, padded to the same number in every image."""

    boxes: Tensor
    """(B, M, 4) ``xyxy`` in pixels; padding rows are zero."""
    labels: Tensor
    """(B, M) class index in [0, K); padding is 0."""
    num_objects: tuple[int, ...]
    """Number of real rows of each image, kept on the host."""
    image_sizes: Tensor
    """(B, 2) width and height in pixels of each unpadded image."""

    @classmethod
    def collate(
        cls,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        *,
        device: torch.device | str | None = None,
    ) -> GroundTruth:
        """Pad the images' objects into one batch.

        Args:
            boxes: B tensors (M_b, 4), ``xyxy`` in pixels.
            labels: B tensors (M_b,), class indices.
            image_sizes: B pairs (height, width), as in Detectron2's ``Instances.image_size``.
            device: where the batch shall live; default: where the first boxes are.

        Raises:
            ValueError: the three arguments disagree in length, or boxes and labels of an image do.
        """
        if not len(boxes) == len(labels) == len(image_sizes):
            raise ValueError(
                f"boxes, labels and sizes of {len(boxes)}, {len(labels)} and {len(image_sizes)} "
                "images cannot form one batch"
            )
        for i, (boxes_i, labels_i) in enumerate(zip(boxes, labels)):
            if len(boxes_i) != len(labels_i):
                raise ValueError(
                    f"image {i} of the batch has {len(boxes_i)} boxes but {len(labels_i)} labels"
                )
        num_objects = tuple(len(x) for x in boxes)
        # At least one (empty) row keeps every later tensor indexable when no image has an object.
        size = max(1, max(num_objects, default=0))
        padded_boxes = boxes[0].new_zeros((len(boxes), size, 4))
        padded_labels = labels[0].new_zeros((len(boxes), size), dtype=torch.long)
        for i, count in enumerate(num_objects):
            padded_boxes[i, :count] = boxes[i]
            padded_labels[i, :count] = labels[i]
        sizes = torch.tensor([(w, h) for h, w in image_sizes], dtype=padded_boxes.dtype)
        device = padded_boxes.device if device is None else device
        tensors = (x.to(device, non_blocking=True) for x in (padded_boxes, padded_labels, sizes))
        padded_boxes, padded_labels, sizes = tensors
        return cls(padded_boxes, padded_labels, num_objects, sizes)

    def to(self, dtype: torch.dtype) -> GroundTruth:
        """The same objects with coordinates of another floating point type."""
        return self._replace(boxes=self.boxes.to(dtype), image_sizes=self.image_sizes.to(dtype))


class Assignment(NamedTuple):
    """Which object each query of all stages and images is responsible for."""

    object_index: Tensor
    """(S, B, N) long: index of the object that the query is matched to, -1 for background.
    Several queries have the same object under one-to-many matching."""

    @property
    def matched(self) -> Tensor:
        """(S, B, N) bool: the query has an object."""
        return self.object_index >= 0


class ClassTargets(NamedTuple):
    """Class targets of all stages and images."""

    multi_hot: Tensor
    """(S, B, N, K) in {0, 1}, or in [0, 1] where labels are graded by the quality of a box; a row
    of zeros is background."""
