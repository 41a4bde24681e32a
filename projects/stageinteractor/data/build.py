"""Data loaders, on Detectron2's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

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
) -> Iterable[list[dict[str, Any]]]:
    """Detectron2's ``build_detection_train_loader``: an endless stream of batches.

    The random numbers follow ``train.seed``: the sampler's order comes from the main process',
    and every loader process is seeded from it.

    Args:
        dataset: dataset dicts.
        mapper: dataset dict -> model input.
        total_batch_size: images a step over all processes.
        num_workers: loader processes of each process.
        skip_unreadable: count and skip images that cannot be read, instead of stopping.
        aspect_ratio_grouping: batch landscape and portrait images apart, to pad less.
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
            f"{world_size} process(es): use a positive multiple of {world_size}"
        )
    if skip_unreadable:
        mapper = SkipUnreadable(mapper, num_images=len(dataset))
    extra = {"pin_memory": True} if torch.cuda.is_available() and _takes("pin_memory") else {}
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

    Args:
        dataset: dataset dicts.
        mapper: dataset dict -> model input.
        batch_size: images a step of each process.
        num_workers: loader processes of each process.

    Raises:
        ValueError: an empty data set.
    """
    if len(dataset) == 0:
        raise ValueError("the test set has no images: check dataloader.test.dataset")
    return build_detection_test_loader(
        dataset, mapper=mapper, batch_size=batch_size, num_workers=num_workers
    )


def _takes(option: str) -> bool:
    # Detectron2 0.6 passes nothing on to the DataLoader; later versions pass on all.
    return all(
        option in parameters
        or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        for parameters in (
            inspect.signature(f).parameters
            for f in (inspect.unwrap(build_detection_train_loader), build_batch_data_loader)
        )
    )
