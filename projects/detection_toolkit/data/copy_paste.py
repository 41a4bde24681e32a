"""Annotated images while they are augmented, and pasting objects of one into another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data.transforms import Transform
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from detectron2.structures.masks import polygons_to_bitmask

from ..errors import UserError

__all__ = ["AnnotatedImage", "CopyPaste", "boxes_of_masks", "count_pixels", "transform_masks"]


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
    """An image and its N objects."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    boxes: np.ndarray
    """(N, 4) float64 ``xyxy`` in pixels, within the image."""
    classes: np.ndarray
    """(N,) int64."""
    masks: np.ndarray | None = None
    """(N, H, W) bool, where they are needed."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.shape[:2]

    def select(self, kept: np.ndarray) -> AnnotatedImage:
        """With some of the objects: (N,) bool, or indices."""
        if kept.dtype == bool and kept.all():
            return self  # masks are large
        masks = None if self.masks is None else self.masks[kept]
        boxes, classes = self.boxes[kept], self.classes[kept]
        return dataclasses.replace(self, boxes=boxes, classes=classes, masks=masks)

    def instances(self, *, with_masks: bool = False) -> Instances:
        """As a detector takes them."""
        instances = Instances(self.size)
        instances.gt_boxes = Boxes(torch.as_tensor(self.boxes, dtype=torch.float32))
        instances.gt_classes = torch.as_tensor(self.classes)
        if with_masks:
            instances.gt_masks = BitMasks(torch.as_tensor(self.masks))
        return instances


def transform_masks(
    annotations: Sequence[Mapping[str, Any]],
    transforms: Transform,
    size: tuple[int, int],
    new_size: tuple[int, int],
) -> np.ndarray:
    """Masks of annotations after transforms, of what was inside of the image.

    Args:
        annotations: N of a dataset dict; polygons, or run lengths as a dict. One without a mask
            counts as its box.
        transforms: of the image.
        size, new_size: (height, width) of the image before and after them.

    Returns:
        (N, H, W) bool.
    """
    masks = np.zeros((len(annotations), *new_size), dtype=bool)
    for mask, annotation in zip(masks, annotations):
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, Mapping):
            mask[:] = transforms.apply_segmentation(mask_util.decode(segmentation)) == 1
            continue
        polygons = [np.array(p, dtype=np.float64).reshape(-1, 2) for p in segmentation or ()]
        if not polygons:
            x0, y0, x1, y1 = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            polygons = [np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)]
        # Not apply_polygons: what is outside is left out below, without the package shapely.
        moved = [transforms.apply_coords(polygon).reshape(-1) for polygon in polygons]
        drawn = polygons_to_bitmask(moved, *new_size)
        # It is stored column by column, which NumPy is slow to turn.
        mask[:] = cv2.transpose(drawn.T.view(np.uint8))
    # Padding has another value than 1, whichever.
    masks &= transforms.apply_segmentation(np.ones(size, dtype=np.uint8)) == 1
    return masks


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """(N, 4) ``xyxy``, the smallest boxes around masks (N, H, W); zeros for empty ones."""
    return BitMasks(masks).get_bounding_boxes().tensor.double().numpy()


class CopyPaste:
    """Pastes some objects of another image over an image, pixel by pixel.

    Of n objects of the other image k are taken, k uniform in 0 .. min(n + 1, ``max_objects``) - 1.
    If any is, boxes of the image's own objects become those of what is still seen of their masks.
    An object that lost pixels is dropped where a side of its box moved by more than ``max_moved``
    and its mask has no more than ``min_pixels`` left, or where nothing is left.
    """

    def __init__(self, max_objects: int = 100, *, max_moved: float = 10, min_pixels: int = 300):
        """
        Args:
            max_objects: one more than are pasted at most.
            max_moved, min_pixels: in pixels, see above.

        Raises:
            UserError: a number that is too small.
        """
        if max_objects < 1 or max_moved < 0 or min_pixels < 0:
            raise UserError(
                "copy-paste needs max_objects of at least 1, and max_moved and min_pixels that are "
                f"not negative; got {max_objects}, {max_moved} and {min_pixels}"
            )
        self.max_objects = max_objects
        self.max_moved = max_moved
        self.min_pixels = min_pixels

    def __call__(self, image: AnnotatedImage, other: AnnotatedImage) -> AnnotatedImage:
        """The image with objects of the other; neither is changed.

        Args:
            image, other: with masks.

        Raises:
            UserError: they differ in size.
        """
        if image.size != other.size:
            raise UserError(
                "copy-paste needs images of one size, and augmentations have made "
                f"{_shown(image.size)} and {_shown(other.size)} pixels: let them end with "
                "FixedSizeCrop"
            )
        count = np.random.randint(min(len(other.boxes) + 1, self.max_objects))
        if not count:
            return image
        pasted = other.select(np.random.choice(len(other.boxes), count, replace=False))
        assert image.masks is not None and pasted.masks is not None
        covered = pasted.masks.any(0)
        seen = self._uncovered(image, covered)
        assert seen.masks is not None
        return AnnotatedImage(
            np.where(covered[..., None], other.image, image.image),
            np.concatenate([seen.boxes, pasted.boxes]),
            np.concatenate([seen.classes, pasted.classes]),
            np.concatenate([seen.masks, pasted.masks]),
        )

    def _uncovered(self, image: AnnotatedImage, covered: np.ndarray) -> AnnotatedImage:
        """The objects that are still there, with what is seen of them.

        Args:
            image: with masks.
            covered: (H, W) bool.
        """
        assert image.masks is not None
        masks = image.masks & ~covered
        pixels = count_pixels(masks)
        boxes = boxes_of_masks(masks)
        has_lost = pixels < count_pixels(image.masks)
        has_moved = (np.abs(boxes - image.boxes) > self.max_moved).any(1)
        kept = (pixels > 0) & ~(has_lost & has_moved & (pixels <= self.min_pixels))
        return dataclasses.replace(image, boxes=boxes, masks=masks).select(kept)


def count_pixels(masks: np.ndarray) -> np.ndarray:
    """(N,) pixels of masks (N, H, W)."""
    return np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64)


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
