"""The values that cross a room's wall. Letters: B images, N queries, S stages, K classes,
M objects (padded to the most in one image of the batch), C channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Assignment", "ClassTargets", "GroundTruth", "StageOutput"]


class StageOutput(NamedTuple):
    """What one decoder stage predicts."""

    logits: Tensor
    """(B, N, K) class logits."""
    boxes: Tensor
    """(B, N, 4) refined boxes, ``xyxy`` in pixels of the resized, unpadded image."""
    xyzr: Tensor
    """(B, N, 4) the same boxes in xyzr code."""
    queries: Tensor
    """(B, N, C) query content after the stage."""


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
        return cls(padded_boxes.to(device), padded_labels.to(device), num_objects, sizes.to(device))

    def to(self, dtype: torch.dtype) -> GroundTruth:
        """The same objects with coordinates of another floating point type."""
        return self._replace(boxes=self.boxes.to(dtype), image_sizes=self.image_sizes.to(dtype))


class Assignment(NamedTuple):
    """One-to-one matches of all stages and images."""

    object_index: Tensor
    """(S, B, N) long: index of the object that the query is matched to, -1 for background."""

    @property
    def matched(self) -> Tensor:
        """(S, B, N) bool: the query has an object."""
        return self.object_index >= 0


class ClassTargets(NamedTuple):
    """Class targets of all stages and images."""

    multi_hot: Tensor
    """(S, B, N, K) in {0, 1}; a row of zeros is background."""
