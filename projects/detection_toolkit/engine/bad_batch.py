"""A batch that training could not use: what it was, and how to try it again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..checkpoint.official_files import CheckpointFileError, read_checkpoint
from ..durable import make_folder, write_durably, write_text

__all__ = ["read_bad_batch", "write_bad_batch"]

_KEPT = ("file_name", "image_id", "height", "width")


def write_bad_batch(
    stem: Path,
    report: Mapping[str, Any],
    batches: Sequence[Sequence[Mapping[str, Any]]],
    *,
    random_state: Tensor,
    model: nn.Module | None = None,
) -> Path:
    """Write ``<stem>.json``, ``<stem>.pth`` and, with a model, ``<stem>_weights.pth``.

    Args:
        stem: path without ending; its folder is made.
        report: JSON values, for people.
        batches: the model's inputs of one step; more than one where gradients are accumulated.
        random_state: of PyTorch's CPU generator before the step.
        model: whose weights the step was computed with.

    Returns:
        the path of ``<stem>.pth``.
    """
    make_folder(stem.parent)
    text = json.dumps(report, indent=2, default=str, ensure_ascii=False)
    write_text(stem.with_name(f"{stem.name}.json"), text)
    content = {
        "batches": [[_plain(image) for image in batch] for batch in batches],
        "random_state": random_state,
        "iteration": report["iteration"],
        "reason": report["reason"],
    }
    path = stem.with_name(f"{stem.name}.pth")
    write_durably(path, lambda file: torch.save(content, file))
    if model is not None:
        weights = {"model": model.state_dict()}
        beside = stem.with_name(f"{stem.name}_weights.pth")
        write_durably(beside, lambda file: torch.save(weights, file))
    return path


def read_bad_batch(path: str | Path) -> dict[str, Any]:
    """What :func:`write_bad_batch` has written: its keys "batches", "random_state", "iteration"
    and "reason", where a batch is a model's input again.

    Raises:
        FileNotFoundError, CheckpointFileError: there is no such file, or it is damaged or another.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get("batches"), list):
        raise CheckpointFileError(f"{path} holds no batch: it must be a bad_batch/iter*_rank*.pth")
    content["batches"] = [[_input(image) for image in batch] for batch in content["batches"]]
    return content


def _plain(image: Mapping[str, Any]) -> dict[str, Any]:
    # Tensors and plain values alone can be read back without running code.
    plain = {k: v for k, v in image.items() if k in _KEPT and isinstance(v, (int, str))}
    if isinstance(image.get("file_name"), os.PathLike):
        plain["file_name"] = os.fspath(image["file_name"])
    # What is missing is the reason of the failure, and not to be hidden by another.
    if isinstance(image.get("image"), Tensor):
        plain["image"] = image["image"].cpu()
    if "instances" in image:
        instances = image["instances"]
        plain["image_size"] = tuple(int(v) for v in instances.image_size)
        plain["gt_boxes"] = instances.gt_boxes.tensor.cpu()
        plain["gt_classes"] = instances.gt_classes.cpu()
    return plain


def _input(plain: dict[str, Any]) -> dict[str, Any]:
    if "gt_boxes" not in plain:
        return plain
    instances = Instances(tuple(plain.pop("image_size")))
    instances.gt_boxes = Boxes(plain.pop("gt_boxes"))
    instances.gt_classes = plain.pop("gt_classes")
    return {**plain, "instances": instances}


def as_json(losses: Mapping[str, float]) -> dict[str, float | str]:
    """Numbers that are not finite as text, as JSON has none."""
    return {k: v if math.isfinite(v) else str(v) for k, v in losses.items()}
