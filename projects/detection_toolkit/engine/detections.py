"""Detections in the forms of other tools: ``supervision.Detections``, COCO results."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from ..errors import MissingPackageError

if TYPE_CHECKING:
    import supervision

__all__ = ["coco_results", "require_supervision", "to_supervision"]


def require_supervision(what: str) -> ModuleType:
    """The package ``supervision``.

    Args:
        what: needs it.

    Raises:
        MissingPackageError: it is missing; says how to install it.
    """
    try:
        import supervision
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs the package supervision: pip install supervision ({error})"
        ) from error
    return supervision


def to_supervision(
    instances: Instances, class_names: Sequence[str] | None = None
) -> supervision.Detections:
    """Detections as ``supervision.Detections``, for its annotators, zones, counters and sinks.

    Args:
        instances: with ``pred_boxes``, ``scores`` and ``pred_classes``, and of a tracked video
            ``track_ids``.
        class_names: of the classes, as ``predictor.metadata.thing_classes`` has them; without
            them the number of a class is its name.

    Returns:
        in the order given: ``xyxy``, ``confidence``, ``class_id``, ``data["class_name"]`` and,
        where there are any, ``tracker_id``.

    Raises:
        MissingPackageError: supervision is missing.
    """
    package = require_supervision("to_supervision")
    instances = instances.to("cpu")
    classes = instances.pred_classes.numpy()
    names = [_name(class_names, index) for index in classes.tolist()]
    return package.Detections(
        xyxy=instances.pred_boxes.tensor.numpy(),
        confidence=instances.scores.numpy(),
        class_id=classes,
        tracker_id=instances.track_ids.numpy() if instances.has("track_ids") else None,
        data={"class_name": np.array(names, dtype=str)},
    )


def coco_results(
    instances: Instances, image_id: str | int, class_names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Detections in COCO's result format, with the class name besides.

    Args:
        instances: see :func:`to_supervision`.
        image_id: of the picture.
        class_names: see :func:`to_supervision`.

    Returns:
        a dict of each: ``image_id``, ``category_id`` (0 to K - 1), ``bbox`` (x, y, width, height
        in pixels), ``score``, ``category_name``; and of a tracked video ``track_id``, None for a
        detection of no track.
    """
    results = instances_to_coco_json(instances.to("cpu"), image_id)
    for result in results:
        result["category_name"] = _name(class_names, result["category_id"])
    if instances.has("track_ids"):
        for result, track in zip(results, instances.track_ids.tolist()):
            result["track_id"] = track if track >= 0 else None
    return results


def _name(class_names: Sequence[str] | None, index: int) -> str:
    return class_names[index] if class_names and index < len(class_names) else str(index)
