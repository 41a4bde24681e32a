"""Pictures of a model's inputs in training: padded as in their batch, with boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.structures.masks import polygons_to_bitmask

from .fonts import drawable
from .pictures import class_color, class_name, draw_labelled_boxes

__all__ = ["draw_training_input"]

_MASK_SHARE = 0.35  # of a mask's colour in its pixels


def draw_training_input(
    view: dict[str, Any],
    padded_size: tuple[int, int],
    metadata: Metadata | None = None,
    *,
    image_format: str = "RGB",
    padding: Sequence[float] = (0.0, 0.0, 0.0),
    names: Sequence[str] | None = None,
    crowds: torch.Tensor | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Draw an input of a model as the model gets it.

    Args:
        view: with "image" (3, H, W), and "instances" (gt_boxes, gt_classes, perhaps gt_masks) where
            it has objects.
        padded_size: (height, width) of its batch, which it is padded to at the right and bottom.
        metadata: of the data set, for names and colours of classes.
        image_format: of the image, "RGB" or "BGR".
        padding: value of each channel of the image that the model pads with.
        names: of the objects, after their classes.
        crowds: (C, 4) boxes that are not trained on; their frames are dashed.
        scale: enlargement; by default small pictures are enlarged until labels are legible.

    Returns:
        (scale padded height, scale padded width, 3) RGB.
    """
    image = view["image"].cpu().float().permute(1, 2, 0).numpy()
    canvas = np.empty((*padded_size, 3), np.float32)
    canvas[:] = np.asarray(padding, np.float32)
    canvas[: image.shape[0], : image.shape[1]] = image
    if image_format == "BGR":
        canvas = canvas[:, :, ::-1]
    canvas = canvas.clip(0, 255)
    instances = view.get("instances") or Instances(image.shape[:2])
    classes = instances.gt_classes.tolist() if instances.has("gt_classes") else []
    if instances.has("gt_masks"):
        for mask, label in zip(_bitmaps(instances), classes):
            color = 255 * np.array(class_color(metadata, label), np.float32)
            seen = canvas[: mask.shape[0], : mask.shape[1]]
            seen[mask] = (1 - _MASK_SHARE) * seen[mask] + _MASK_SHARE * color
    boxes = instances.gt_boxes.tensor if classes else torch.zeros(0, 4)
    labels = [class_name(metadata, c) for c in classes]
    if names is not None:
        labels = [f"{label} {drawable(name)}".rstrip() for label, name in zip(labels, names)]
    number = len(classes)
    if crowds is not None:
        boxes = torch.cat([boxes, crowds])
        classes = [*classes, *[0] * len(crowds)]
        labels += ["crowd"] * len(crowds)
    return draw_labelled_boxes(
        canvas.astype(np.uint8),
        Boxes(boxes),
        classes,
        labels,
        metadata,
        dashed=range(number, len(classes)),
        scale=scale,
    )


def _bitmaps(instances: Instances) -> np.ndarray:
    """(N, H, W) bool."""
    masks = instances.gt_masks
    if isinstance(masks, BitMasks):
        return masks.tensor.numpy()
    return np.array([polygons_to_bitmask(list(p), *instances.image_size) for p in masks.polygons])
