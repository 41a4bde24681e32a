"""From several dataset dicts to one model's input: mosaic, mixup, copy-paste."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from detectron2.data.detection_utils import check_image_size
from detectron2.data.transforms import AugInput, Augmentation, Transform

from ..errors import UserError
from ..texts import shown
from .copy_paste import AnnotatedImage, CopyPaste, boxes_of_masks, transform_masks
from .images import MAX_PIXELS, read_image
from .mapper import DetectionMapper, augment, boxes_of_objects, is_object
from .mosaic import MixUp, Mosaic

__all__ = ["MultiImageMapper"]

_Mapper = TypeVar("_Mapper", bound="MultiImageMapper")
# As Detectron2 drops thinner boxes.
_MIN_SIDE = 1e-5


class MultiImageMapper(DetectionMapper):
    """A :class:`DetectionMapper` for training that puts images of the data set together.

    First an image and three others become a mosaic, then one of them and another such image are
    mixed, then objects of a further image are pasted into the result; each part may be left out.
    Other images are drawn evenly from the data set, and augmented as the image itself is, before
    they are put together. Without any part the inputs are those of a :class:`DetectionMapper`.
    """

    def __init__(
        self,
        *,
        augmentations: Sequence[Augmentation | Transform],
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
            augmentations: of every image by itself, in order.
            image_format: what the detector takes; "RGB" or "BGR".
            mosaic, mixup: put images together; None: not.
            copy_paste: pastes objects. Augmentations must bring images to one size.
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
        self.mosaic = mosaic
        self.mixup = mixup
        self.copy_paste = copy_paste
        self._gives_masks = use_instance_mask

    def alone(self: _Mapper) -> _Mapper:
        """The same for images by themselves: without mosaic, mixup and copy-paste."""
        mapper = copy.copy(self)
        mapper.mosaic = mapper.mixup = mapper.copy_paste = None
        return mapper

    def __call__(  # type: ignore[override]
        self, dataset_dict: dict[str, Any], others: Sequence[dict[str, Any]] = ()
    ) -> Any:
        """
        Args:
            dataset_dict: as Detectron2 defines it; it is not changed.
            others: those of the data set, of which other images are drawn.

        Returns:
            the model's input; see :class:`DetectionMapper`.

        Raises:
            UnreadableImageError, ImageSizeError: see :class:`DetectionMapper`; also of another
                image.
            UserError: an image without "annotations", or no other images.
        """
        record = dict(dataset_dict)
        image = self._mix(self._read(record), others)
        if self.copy_paste is not None:
            image = self.copy_paste(image, self._read(self._other(others, "copy_paste")))
        return self._input(image, record)

    def _mix(self, image: AnnotatedImage, others: Sequence[dict[str, Any]]) -> AnnotatedImage:
        """An image with mosaic and mixup."""
        image = self._tile(image, others)
        if self.mixup is not None and np.random.uniform() < self.mixup.prob:
            other = self._tile(self._read(self._other(others, "mixup")), others)
            image = self.mixup(image, [other])
        return image

    def _tile(self, image: AnnotatedImage, others: Sequence[dict[str, Any]]) -> AnnotatedImage:
        """An image, or a mosaic with it."""
        if self.mosaic is None or np.random.uniform() >= self.mosaic.prob:
            return image
        parts = [self._read(self._other(others, "mosaic")) for _ in range(self.mosaic.num_others)]
        return self.mosaic(image, parts)

    def _other(self, others: Sequence[dict[str, Any]], part: str) -> dict[str, Any]:
        """A dataset dict, each as likely."""
        if not len(others):
            raise UserError(f"{part} needs the data set to take images from: see others")
        return dict(others[np.random.randint(len(others))])

    def _input(self, image: AnnotatedImage, record: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.as_tensor(np.ascontiguousarray(image.image.transpose(2, 0, 1)))
        instances = image.instances(with_masks=self._gives_masks)
        kept = {key: value for key, value in record.items() if key != "annotations"}
        return {**copy.deepcopy(kept), "image": pixels, "instances": instances}

    def _read(self, record: dict[str, Any]) -> AnnotatedImage:
        """The image after the augmentations, with the objects that it still has.

        A record without the image's size is given it.
        """
        image, _ = self._augmented(record)
        return image.select((image.boxes[:, 2:] - image.boxes[:, :2] > _MIN_SIDE).all(1))

    def _augmented(self, record: dict[str, Any]) -> tuple[AnnotatedImage, np.ndarray]:
        """The image after the augmentations with all of its N objects, and (N,) bool: whether it
        shows a part of the box."""
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
        boxes = clipped(transforms.apply_box(boxes), new_size)
        is_seen = (boxes[:, 2:] > boxes[:, :2]).all(1)
        masks = None
        if self._loads_masks:
            masks = transform_masks(objects, transforms, size, new_size)
        result = AnnotatedImage(augmented.image, boxes, classes, masks)
        if self.recompute_boxes:
            assert masks is not None
            result = dataclasses.replace(result, boxes=boxes_of_masks(masks))
        return result, is_seen


def clipped(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) ``xyxy`` within an image of (height, width)."""
    height, width = size
    return boxes.clip(min=0, max=(width, height, width, height))
