"""Every training image twice: weakly augmented, and a strongly augmented copy of that."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import check_image_size
from detectron2.data.transforms import AugInput, Augmentation, AugmentationList, Transform

from ..errors import UserError
from ..texts import shown
from .copy_paste import AnnotatedImage, CopyPaste, boxes_of_masks, transform_masks
from .images import MAX_PIXELS, read_image
from .mapper import DetectionMapper, augment, boxes_of_objects, is_object
from .strong import ErasingTransform

__all__ = ["WeakStrongMapper"]

# Thinner boxes are dropped.
_MIN_SIDE = 0.01
# A box of which so much is erased is dropped.
_MOST_ERASED = 0.9


class WeakStrongMapper(DetectionMapper):
    """Makes two model inputs of an image, the second an augmented copy of the first.

    ``build_train_loader`` puts the first of all images before the second of all. Matching, losses
    and their normalisation then see twice as many images as ``total_batch_size`` says.

    The first one loses boxes thinner than 0.01 pixels. Where an image has only such, another image
    takes its place; one whose crop has no object is kept. In the second one, a box ends at the
    border, and may have no area left there. Only a box of which 90 % are erased is dropped.

    With ``copy_paste``, objects of other images of the data set, augmented as the first input is,
    are pasted into both inputs, each from another image.
    """

    view_names = ("weak", "strong")
    """The model's inputs of an image."""

    def __init__(
        self,
        *,
        augmentations: Sequence[Augmentation | Transform],
        strong_augmentations: Sequence[Augmentation | Transform],
        image_format: str = "RGB",
        copy_paste: CopyPaste | None = None,
        recompute_boxes: bool = False,
        use_instance_mask: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        """
        Args:
            augmentations: of both inputs, in order.
            strong_augmentations: of the second one alone, in order, after the others. They must
                keep the size.
            image_format: what the detector takes; "RGB" or "BGR".
            copy_paste: pastes objects into both. The augmentations must bring images to one size.
            recompute_boxes: after the augmentations, boxes become those around masks. An object
                without a mask counts as its box.
            use_instance_mask: the instances have ``gt_masks`` (``BitMasks``).
            max_pixels: larger images are refused before they are decoded.

        Raises:
            ValueError: an image format that is neither.
        """
        self._loads_masks = use_instance_mask or recompute_boxes or copy_paste is not None
        super().__init__(
            True,
            augmentations=augmentations,
            image_format=image_format,
            use_instance_mask=self._loads_masks,
            instance_mask_format="bitmask",
            recompute_boxes=recompute_boxes,
            max_pixels=max_pixels,
        )
        self.strong_augmentations = AugmentationList(list(strong_augmentations))
        self.copy_paste = copy_paste
        self._gives_masks = use_instance_mask

    def __call__(  # type: ignore[override]
        self, dataset_dict: dict[str, Any], others: Sequence[dict[str, Any]] = ()
    ) -> list[dict[str, Any]] | None:
        """
        Args:
            dataset_dict: as Detectron2 defines it; it is not changed.
            others: those of the data set, of which ``copy_paste`` takes objects.

        Returns:
            the model's inputs, weak and strong; see :class:`DetectionMapper`. None where another
            image must take its place.

        Raises:
            UnreadableImageError, ImageSizeError: see :class:`DetectionMapper`; also of an image
                whose objects are to be pasted.
            UserError: an image without "annotations", augmentations that give images of different
                sizes, or nothing to paste from.
        """
        record = dict(dataset_dict)
        weak = self._read(record)
        if weak is None:
            return None
        views = [weak, self._strengthen(weak)]
        if self.copy_paste is not None:
            views = [self._paste(view, others, self.copy_paste) for view in views]
        del record["annotations"]
        return [self._input(view, record) for view in views]

    def _input(self, view: AnnotatedImage, record: dict[str, Any]) -> dict[str, Any]:
        image = torch.as_tensor(np.ascontiguousarray(view.image.transpose(2, 0, 1)))
        instances = view.instances(with_masks=self._gives_masks)
        return {**copy.deepcopy(record), "image": image, "instances": instances}

    def _read(self, record: dict[str, Any]) -> AnnotatedImage | None:
        """The image after the weak augmentations; None where all its boxes are too thin.

        A record without the image's size is given it.
        """
        file_name = record["file_name"]
        if "annotations" not in record:
            raise UserError(f'{shown(file_name)} has no ground truth: it lacks "annotations"')
        objects = [a for a in record["annotations"] if is_object(a)]
        boxes = boxes_of_objects(objects)
        classes = np.array([a["category_id"] for a in objects], dtype=np.int64)
        with self.named_errors(file_name):
            image = read_image(file_name, self.image_format, max_pixels=self.max_pixels)
            check_image_size(record, image)
            augmented = AugInput(image, boxes=boxes.copy())
            transforms = augment(self.augmentations, augmented, file_name)
        size, new_size = image.shape[:2], augmented.image.shape[:2]
        boxes = _clipped(transforms.apply_box(boxes), new_size)
        is_seen = (boxes[:, 2:] > boxes[:, :2]).all(1)
        masks = None
        if self._loads_masks:
            masks = transform_masks(objects, transforms, size, new_size)
        if self.recompute_boxes:
            assert masks is not None
            boxes = boxes_of_masks(masks)
        is_kept = (boxes[:, 2:] - boxes[:, :2] > _MIN_SIDE).all(1)
        if is_seen.any() and not is_kept.any():
            return None
        return AnnotatedImage(augmented.image, boxes, classes, masks).select(is_kept)

    def _strengthen(self, weak: AnnotatedImage) -> AnnotatedImage:
        augmented = AugInput(weak.image, boxes=weak.boxes.copy())
        transforms = self.strong_augmentations(augmented)
        if augmented.image.shape != weak.image.shape:
            raise UserError("strong_augmentations must keep the size of the images")
        boxes, masks = weak.boxes, weak.masks
        is_kept = np.ones(len(boxes), dtype=bool)
        for transform in transforms.transforms:
            boxes = _clipped(transform.apply_box(boxes), weak.size)
            if isinstance(transform, ErasingTransform):
                is_kept &= transform.covered_share(boxes) < _MOST_ERASED
            if masks is not None and len(masks):
                masks = np.stack([transform.apply_segmentation(mask) for mask in masks])
        strong = dataclasses.replace(weak, image=augmented.image, boxes=boxes, masks=masks)
        return strong.select(is_kept)

    def _paste(
        self, view: AnnotatedImage, others: Sequence[dict[str, Any]], copy_paste: CopyPaste
    ) -> AnnotatedImage:
        if not len(others):
            raise UserError("copy_paste needs the data set to take objects from: see others")
        other = self._read(dict(others[np.random.randint(len(others))]))
        return view if other is None else copy_paste(view, other)


def _clipped(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return boxes.clip(min=0, max=(width, height, width, height))
