"""Every training image twice: weakly augmented, and a strongly augmented copy of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data.transforms import AugInput, Augmentation, AugmentationList, Transform

from ..errors import UserError
from .copy_paste import AnnotatedImage, CopyPaste
from .images import MAX_PIXELS
from .mosaic import MixUp, Mosaic
from .multi_image import MultiImageMapper, clipped
from .strong import ErasingTransform

__all__ = ["WeakStrongMapper"]

# Thinner boxes are dropped.
_MIN_SIDE = 0.01
# A box of which so much is erased is dropped.
_MOST_ERASED = 0.9


class WeakStrongMapper(MultiImageMapper):
    """Makes two model inputs of an image, the second an augmented copy of the first.

    ``build_train_loader`` puts the first of all images before the second of all. Matching, losses
    and their normalisation then see twice as many images as ``total_batch_size`` says.

    The first one loses boxes thinner than 0.01 pixels. Where an image has only such, another image
    takes its place; one whose crop has no object is kept. In the second one, a box ends at the
    border, and may have no area left there. Only a box of which 90 % are erased is dropped.

    With ``mosaic`` and ``mixup`` the first input is made of several images, and the second one is
    its copy. With ``copy_paste``, objects of other images of the data set, augmented as the first
    input is, are pasted into both inputs, each from another image.
    """

    view_names = ("weak", "strong")
    """The model's inputs of an image."""

    def __init__(
        self,
        *,
        augmentations: Sequence[Augmentation | Transform],
        strong_augmentations: Sequence[Augmentation | Transform],
        image_format: str = "RGB",
        mosaic: Mosaic | None = None,
        mixup: MixUp | None = None,
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
            mosaic, mixup, recompute_boxes, use_instance_mask, max_pixels: see
                :class:`MultiImageMapper`.
            copy_paste: pastes objects into both. The augmentations must bring images to one size.

        Raises:
            ValueError: an image format that is neither.
        """
        super().__init__(
            augmentations=augmentations,
            image_format=image_format,
            mosaic=mosaic,
            mixup=mixup,
            copy_paste=copy_paste,
            recompute_boxes=recompute_boxes,
            use_instance_mask=use_instance_mask,
            max_pixels=max_pixels,
        )
        self.strong_augmentations = AugmentationList(list(strong_augmentations))

    def __call__(
        self, dataset_dict: dict[str, Any], others: Sequence[dict[str, Any]] = ()
    ) -> list[dict[str, Any]] | None:
        """
        Args:
            dataset_dict: as Detectron2 defines it; it is not changed.
            others: those of the data set, of which other images are drawn.

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
        weak = self._weak(record)
        if weak is None:
            return None
        weak = self._mix(weak, others)
        views = [weak, self._strengthen(weak)]
        if self.copy_paste is not None:
            views = [self._paste(view, others, self.copy_paste) for view in views]
        return [self._input(view, record) for view in views]

    def _weak(self, record: dict[str, Any]) -> AnnotatedImage | None:
        """The image after the weak augmentations; None where all its boxes are too thin.

        A record without the image's size is given it.
        """
        image, is_seen = self._augmented(record)
        is_kept = (image.boxes[:, 2:] - image.boxes[:, :2] > _MIN_SIDE).all(1)
        if is_seen.any() and not is_kept.any():
            return None
        return image.select(is_kept)

    def _strengthen(self, weak: AnnotatedImage) -> AnnotatedImage:
        augmented = AugInput(weak.image, boxes=weak.boxes.copy())
        transforms = self.strong_augmentations(augmented)
        if augmented.image.shape != weak.image.shape:
            raise UserError("strong_augmentations must keep the size of the images")
        boxes, masks = weak.boxes, weak.masks
        is_kept = np.ones(len(boxes), dtype=bool)
        for transform in transforms.transforms:
            boxes = clipped(transform.apply_box(boxes), weak.size)
            if isinstance(transform, ErasingTransform):
                is_kept &= transform.covered_share(boxes) < _MOST_ERASED
            if masks is not None and len(masks):
                masks = np.stack([transform.apply_segmentation(mask) for mask in masks])
        strong = dataclasses.replace(weak, image=augmented.image, boxes=boxes, masks=masks)
        return strong.select(is_kept)

    def _paste(
        self, view: AnnotatedImage, others: Sequence[dict[str, Any]], copy_paste: CopyPaste
    ) -> AnnotatedImage:
        other = self._weak(self._other(others, "copy_paste"))
        return view if other is None else copy_paste(view, other)
