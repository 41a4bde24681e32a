"""What every stage detects, kept by an evaluation by stage for whoever compares stages later."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances

from ..durable import write_durably
from ..errors import UserError

__all__ = ["STAGE_PREDICTIONS", "StagePredictions", "read_stage_predictions"]

STAGE_PREDICTIONS = "stage_predictions.npz"
_KEYS = {"images": 1, "stages": 1, "image": 1, "category": 1, "score": 1, "box": 2}


class StagePredictions:
    """Collects the detections of each stage, image by image."""

    def __init__(self, num_stages: int):
        self._found: list[list[tuple[Any, np.ndarray, np.ndarray, np.ndarray]]] = [
            [] for _ in range(num_stages)
        ]

    def add(self, stage: int, image_id: Any, instances: Instances) -> None:
        """Those of a stage in one image, on the CPU, in its pixels."""
        boxes = instances.pred_boxes.tensor.numpy()
        # As in Detectron2's results: the sides from float32 corners.
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        found = (image_id, instances.pred_classes.numpy(), instances.scores.numpy(), boxes)
        self._found[stage].append(found)

    def extend(self, other: StagePredictions) -> None:
        """Take those of another process."""
        for mine, theirs in zip(self._found, other._found):
            mine += theirs

    def write(self, path: Path, category_ids: Mapping[int, Any] | None = None) -> None:
        """As one file.

        Args:
            path: of the file.
            category_ids: class -> id in the data set; None: they are the same.
        """
        images = list({image_id: None for image_id, *_ in self._found[0]})
        places = {image_id: i for i, image_id in enumerate(images)}
        parts = [part for stage in self._found for part in stage]
        sizes = [sum(len(scores) for _, _, scores, _ in stage) for stage in self._found]
        classes = _joined([p[1] for p in parts], (0,), np.int64)
        if category_ids is not None and len(classes):
            classes = np.array([category_ids[k] for k in range(len(category_ids))])[classes]
        arrays = {
            "images": np.array([json.dumps(image_id) for image_id in images], dtype=np.str_),
            "stages": np.array(sizes, dtype=np.int64),
            "image": np.repeat([places[p[0]] for p in parts], [len(p[2]) for p in parts]).astype(
                np.int32
            ),
            "category": classes,
            "score": _joined([p[2] for p in parts], (0,), np.float32),
            "box": _joined([p[3] for p in parts], (0, 4), np.float32),
        }
        write_durably(path, lambda file: np.savez_compressed(file, **arrays))


def read_stage_predictions(path: Path) -> list[list[dict[str, Any]]] | None:
    """Detections of each stage in COCO's format; None where there is no such file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in _KEYS}
        images = [json.loads(text) for text in arrays["images"].tolist()]
        _check(arrays, len(images))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again") from error
    ends = arrays["stages"].cumsum()
    columns: Iterable = zip(
        *(arrays[key].tolist() for key in ("image", "category", "score", "box"))
    )
    results = [
        {"image_id": images[i], "category_id": k, "score": score, "bbox": box}
        for i, k, score, box in columns
    ]
    return [results[end - size : end] for size, end in zip(arrays["stages"].tolist(), ends)]


def _check(arrays: Mapping[str, np.ndarray], num_images: int) -> None:
    sizes, places = arrays["stages"], arrays["image"]
    number = len(arrays["score"])
    if any(arrays[key].ndim != axes for key, axes in _KEYS.items()):
        raise ValueError("arrays of another shape")
    if any(len(arrays[key]) != number for key in ("image", "category", "box")):
        raise ValueError("arrays of other lengths")
    if sizes.dtype.kind != "i" or (sizes < 0).any() or sizes.sum() != number:
        raise ValueError("stages of another number of detections")
    if places.dtype.kind != "i" or (number and not 0 <= places.min() <= places.max() < num_images):
        raise ValueError("detections of unknown images")
    if not (np.isfinite(arrays["score"]).all() and np.isfinite(arrays["box"]).all()):
        raise ValueError("numbers that are not finite")


def _joined(parts: Sequence[np.ndarray], empty: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(empty, dtype)
