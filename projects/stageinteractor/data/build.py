"""Data loaders, on Detectron2's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import cv2
import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.build import build_batch_data_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader, Sampler

from .mapper import SkipUnreadable

__all__ = ["build_test_loader", "build_train_loader"]


def build_train_loader(
    *,
    dataset: list[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
    total_batch_size: int,
    num_workers: int = 4,
    skip_unreadable: bool = False,
    aspect_ratio_grouping: bool = True,
    sampler: Sampler | None = None,
):
    """Detectron2's ``build_detection_train_loader``: an endless stream of batches.

    Args:
        dataset: dataset dicts.
        mapper: dataset dict -> model input.
        total_batch_size: images a step over all processes.
        num_workers: loader processes of each process.
        skip_unreadable: count and skip images that cannot be read, instead of stopping.
        aspect_ratio_grouping: batch landscape and portrait images apart.
        sampler: default: Detectron2's endless ``TrainingSampler``.

    Raises:
        ValueError: an empty data set, or a batch that the processes cannot share evenly.
    """
    if len(dataset) == 0:
        raise ValueError("the training set has no images: check dataloader.train.dataset")
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            f"dataloader.train.total_batch_size={total_batch_size} cannot be shared evenly by "
            f"{world_size} processes: use a multiple of {world_size}"
        )
    if skip_unreadable:
        mapper = SkipUnreadable(mapper, num_images=len(dataset))
    extra = {}
    if "pin_memory" in _loader_options() and torch.cuda.is_available():
        extra["pin_memory"] = True  # newer Detectron2 only
    # A loader process of its own is the unit of parallelism; OpenCV's threads would compete.
    cv2.setNumThreads(0)
    return build_detection_train_loader(
        dataset,
        mapper=mapper,
        sampler=sampler,
        total_batch_size=total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        **extra,
    )


def build_test_loader(
    *,
    dataset: list[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    batch_size: int = 1,
    num_workers: int = 4,
) -> DataLoader:
    """Detectron2's ``build_detection_test_loader``: every image once, shared by the processes.

    Raises:
        ValueError: an empty data set.
    """
    if len(dataset) == 0:
        raise ValueError("the test set has no images: check dataloader.test.dataset")
    return build_detection_test_loader(
        dataset, mapper=mapper, batch_size=batch_size, num_workers=num_workers
    )


def _loader_options() -> set[str]:
    return set(inspect.signature(build_batch_data_loader).parameters)
