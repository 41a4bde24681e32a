"""The objects of a test set, for what compares predictions with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import BoxMode
from torch import Tensor

from ..data import get_detection_dataset
from ..structures import GroundTruth

__all__ = [
    "annotated_records",
    "collate_objects",
    "count_needed_classes",
    "objects_as_seen",
    "objects_of",
]


def annotated_records(dataset_name: str) -> list[dict[str, Any]]:
    """Detectron2's dicts of a data set; none where no image has an object.

    Args:
        dataset_name: in Detectron2's catalogues.
    """
    # Wherever its images lie: none is opened here.
    records = get_detection_dataset(dataset_name, allow_outside=True, filter_empty=False)
    # A test set may still be listed with empty annotations; without any object nothing counts.
    return records if any(record.get("annotations") for record in records) else []


def count_needed_classes(records: Iterable[Mapping[str, Any]]) -> int:
    """The least number of classes of a model that has those of all objects; crowds are none."""
    annotations = (a for record in records for a in record.get("annotations", []))
    return max((a["category_id"] + 1 for a in annotations if not a.get("iscrowd", 0)), default=0)


def objects_of(record: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(M, 4) ``xyxy`` boxes in pixels of the original image, (M,) classes, (M,) crowds."""
    annotations = record.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return (
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor([a["category_id"] for a in annotations], dtype=torch.long),
        torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool),
    )


def objects_as_seen(
    objects: tuple[Tensor, Tensor, Tensor], x: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with boxes in pixels of the resized image.

    Args:
        objects: of :func:`objects_of`.
        x: the image as the model is given it: "image", and the original "width" and "height".
    """
    boxes, classes, crowd = objects
    height, width = x["image"].shape[-2:]
    scale = boxes.new_tensor([width / x["width"], height / x["height"]]).repeat(2)
    return boxes * scale, classes, crowd


def collate_objects(
    objects: Sequence[tuple[Tensor, Tensor, Tensor]],
    inputs: Sequence[Mapping[str, Any]],
    *,
    device: torch.device | None = None,
) -> GroundTruth:
    """A batch as training has it: without crowds.

    Args:
        objects: of each image, by :func:`objects_as_seen`.
        inputs: the images as the model is given them.
        device: see :meth:`GroundTruth.collate`.
    """
    return GroundTruth.collate(
        [boxes[~crowd] for boxes, _, crowd in objects],
        [labels[~crowd] for _, labels, crowd in objects],
        [tuple(x["image"].shape[-2:]) for x in inputs],
        device=device,
    )
