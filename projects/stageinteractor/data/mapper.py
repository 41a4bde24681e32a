"""From a dataset dict to a model's input."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.transforms import Augmentation, Transform

__all__ = ["DetectionMapper", "SkipUnreadable", "UnreadableImageError"]

logger = logging.getLogger(__name__)


class UnreadableImageError(OSError):
    """An image file that is missing or cannot be decoded."""


class DetectionMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, for boxes, with errors that name the file.

    Orientation by EXIF, conversion to RGB, and dropping boxes that an augmentation made empty are
    as there; an image whose last box is dropped is kept and trained on.
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
    ):
        """
        Args:
            is_train: keep and transform the annotations.
            augmentations: Detectron2's augmentations, in order.
            image_format: what the detector takes; "RGB".
            use_instance_mask, instance_mask_format, recompute_boxes: see ``DatasetMapper``.
        """
        super().__init__(
            is_train,
            augmentations=list(augmentations),
            image_format=image_format,
            use_instance_mask=use_instance_mask,
            instance_mask_format=instance_mask_format,
            recompute_boxes=recompute_boxes,
        )

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            UnreadableImageError: the image is missing or damaged; names the file.
            ValueError: its size is not what the annotations say; names the file.
        """
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:
            raise ValueError(
                f"{error}: {dataset_dict['file_name']} does not have the height and width that "
                "its annotations state"
            ) from error
        except (OSError, SyntaxError) as error:
            # Pillow raises SyntaxError for some damaged PNG files.
            raise UnreadableImageError(
                f"image {dataset_dict['file_name']} cannot be read ({error}). Repair or remove "
                "it, or leave such images out with dataloader.train.skip_unreadable=true"
            ) from error


class SkipUnreadable:
    """Wraps a mapper: an unreadable image is counted and skipped instead of ending the run.

    Detectron2's ``MapDataset`` then takes another image at random.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], dict[str, Any]], num_images: int):
        """
        Args:
            mapper: raises :class:`UnreadableImageError`.
            num_images: size of the data set, to notice when nothing in it can be read.
        """
        self.mapper = mapper
        self.num_images = num_images
        self.skipped: set[str] = set()

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self.mapper(dataset_dict)
        except UnreadableImageError as error:
            name = dataset_dict["file_name"]
            if name not in self.skipped:
                self.skipped.add(name)
                if len(self.skipped) >= self.num_images:
                    raise UnreadableImageError(
                        f"none of the {self.num_images} images can be read; the last one: {error}"
                    ) from error
                logger.warning("skipped unreadable image %s (%d so far)", name, len(self.skipped))
            return None
