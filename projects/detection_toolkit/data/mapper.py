"""From a dataset dict to a model's input."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.data.transforms import (
    AugInput,
    Augmentation,
    AugmentationList,
    PadTransform,
    Transform,
    TransformList,
)
from detectron2.structures import BoxMode
from torch.utils.data import get_worker_info

from ..errors import UserError
from ..texts import shown
from .images import MAX_PIXELS, UnreadableImageError, read_image

__all__ = [
    "DetectionMapper",
    "ImageSizeError",
    "SkipUnreadable",
    "augment",
    "boxes_of_objects",
    "is_object",
    "shown_frame",
]

logger = logging.getLogger(__name__)

# Resizing a thinner image leaves nothing of its shorter side.
_MAX_ASPECT = 100


class ImageSizeError(UserError, SizeMismatchError):
    """An image has another size than its annotations say."""


def augment(
    augmentations: AugmentationList, augmented: AugInput, file_name: str = "the picture"
) -> TransformList:
    """Apply augmentations in place; returns what they did.

    Raises:
        UnreadableImageError: an image is too thin for them; names the file.
    """
    height, width = augmented.image.shape[:2]
    try:
        return augmentations(augmented)
    except (ValueError, ZeroDivisionError, AssertionError, cv2.error) as error:
        if max(height, width) <= _MAX_ASPECT * min(height, width):
            raise
        raise UnreadableImageError(
            f"image {shown(file_name)} of {width}x{height} pixels is too thin to be resized "
            f"({type(error).__name__}: {error})"
        ) from error


class DetectionMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, for boxes, with errors that name the file.

    Orientation by EXIF, conversion to ``image_format`` (from grey, palette, RGBA, ...), and
    dropping of boxes that an augmentation made empty are as there. An image whose last box is
    dropped is kept and trained on.
    """

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[Augmentation | Transform],
        image_format: str = "RGB",
        use_instance_mask: bool = False,
        instance_mask_format: str = "polygon",
        recompute_boxes: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        """
        Args:
            is_train: keep the annotations, and transform them with the image.
            augmentations: Detectron2's augmentations, in order; which of them resizes, and how,
                is the config's choice.
            image_format: what the detector takes; "RGB" or "BGR".
            use_instance_mask, instance_mask_format, recompute_boxes: see ``DatasetMapper``.
            max_pixels: larger images are refused before they are decoded.

        Raises:
            ValueError: an image format that is neither.
        """
        if image_format not in ("RGB", "BGR"):
            raise UserError(f"image_format must be RGB or BGR, it is {image_format!r}")
        super().__init__(
            is_train,
            augmentations=list(augmentations),
            image_format=image_format,
            use_instance_mask=use_instance_mask,
            instance_mask_format=instance_mask_format,
            recompute_boxes=recompute_boxes,
        )
        self.max_pixels = max_pixels

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: as Detectron2 defines it; it is not changed.

        Returns:
            the dict without "annotations", with "image" (3, H, W) uint8, "height" and "width" of
            the original image (at test time of :func:`shown_frame`), and in training "instances"
            (gt_boxes, gt_classes).

        Raises:
            UnreadableImageError: the image is missing, damaged, too large or too thin; names the
                file.
            ImageSizeError: the image has another size than the annotations say; names the file.
        """
        with self.named_errors(dataset_dict["file_name"]):
            return self._map(copy.deepcopy(dataset_dict))

    @contextlib.contextmanager
    def named_errors(self, file_name: str) -> Iterator[None]:
        """While an image is read and augmented: errors that name it and say what to do.

        Raises:
            UnreadableImageError, ImageSizeError: see :meth:`__call__`.
        """
        if get_worker_info() is not None:
            # Loader processes are the parallelism; threads within them would only compete. With 1
            # OpenCV would wait for threads that the parent has and a forked process has not.
            cv2.setNumThreads(0)
        try:
            yield
        except SizeMismatchError as error:
            raise ImageSizeError(f"image {shown(file_name)}: {error}") from error
        except UnreadableImageError as error:
            advice = "Repair or remove it"
            if self.is_train:
                advice += (
                    ", or skip such images in training with dataloader.train.skip_unreadable=true"
                )
            named = UnreadableImageError(f"{error}. {advice}")
            named.file_name = file_name
            raise named from error

    def _map(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        file_name = dataset_dict["file_name"]
        image = read_image(file_name, self.image_format, max_pixels=self.max_pixels)
        check_image_size(dataset_dict, image)
        # Some augmentations choose by the boxes, such as MinIoURandomCrop.
        boxes = None
        if self._has_truth(dataset_dict):
            boxes = boxes_of_objects([a for a in dataset_dict["annotations"] if is_object(a)])
        augmented = AugInput(image, boxes=boxes)
        transforms = augment(self.augmentations, augmented, file_name)
        image = augmented.image
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            dataset_dict.pop("annotations", None)
            size = (dataset_dict["height"], dataset_dict["width"])
            frame = shown_frame(transforms, size, image.shape[:2])
            dataset_dict["height"], dataset_dict["width"] = frame
        elif self._has_truth(dataset_dict):
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict

    def _has_truth(self, dataset_dict: dict[str, Any]) -> bool:
        return self.is_train and "annotations" in dataset_dict


def is_object(annotation: Mapping[str, Any]) -> bool:
    """Whether it is trained on: crowds are not."""
    return not annotation.get("iscrowd", 0)


def boxes_of_objects(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(N, 4) float64 ``xyxy`` of N annotations."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def shown_frame(
    transforms: TransformList, size: tuple[int, int], new_size: tuple[int, int]
) -> tuple[float, float]:
    """(height, width) that an augmented image takes up, in pixels of the original one.

    Detections are scaled to it. It is the size of the original image, and more where padding at
    the right and bottom belongs to the augmented image.

    Args:
        transforms: from the original to the augmented image.
        size, new_size: (height, width) of them.
    """
    if not any(isinstance(t, PadTransform) for t in transforms.transforms):
        return size
    x, y = transforms.apply_coords(np.array([[size[1], size[0]]], dtype=np.float64))[0]
    return float(size[0] * new_size[0] / y), float(size[1] * new_size[1] / x)


class SkipUnreadable:
    """Wraps a mapper: an unreadable image is counted and skipped instead of ending the run.

    :class:`~detection_toolkit.data.stream.SeededDataset` then takes another image. Every loader
    process counts for itself.
    """

    def __init__(
        self,
        mapper: Callable[..., Any],
        num_images: int,
        max_named: int = 5,
    ):
        """
        Args:
            mapper: raises :class:`UnreadableImageError`.
            num_images: distinct image files of the data set, to notice when none can be read.
            max_named: so many files are named in the log; of later ones it gives the number at
                each doubling.
        """
        self.mapper = mapper
        self.num_images = num_images
        self.max_named = max_named
        self.skipped: set[str] = set()

    def __call__(self, dataset_dict: dict[str, Any], *others: Sequence[dict[str, Any]]) -> Any:
        """The mapper's result, or None for an unreadable image.

        Args:
            dataset_dict, others: what the mapper takes.

        Raises:
            UnreadableImageError: no image of the data set can be read.
        """
        try:
            return self.mapper(dataset_dict, *others)
        except UnreadableImageError as error:
            # It may be another one, whose objects were to be pasted.
            self._count(error.file_name or dataset_dict["file_name"], error)
            return None

    def alone(self) -> SkipUnreadable:
        """The same with ``mapper.alone()``; both count as one."""
        other = copy.copy(self)
        other.mapper = self.mapper.alone()  # type: ignore[attr-defined]
        return other

    @property
    def view_names(self) -> Sequence[str]:
        """Those of the mapper, where it makes several inputs of an image."""
        return getattr(self.mapper, "view_names", ())

    def _count(self, file_name: str, error: UnreadableImageError) -> None:
        if file_name in self.skipped:
            return
        self.skipped.add(file_name)
        count = len(self.skipped)
        if count >= self.num_images:
            raise UnreadableImageError(
                f"none of the {self.num_images} images can be read; the last one: {error}"
            ) from error
        if count <= self.max_named:
            logger.warning("skipped unreadable image %s (%d so far)", shown(file_name), count)
        elif count & (count - 1) == 0:
            logger.warning("skipped %d unreadable images so far", count)
