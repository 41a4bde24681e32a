"""Data loaders, on Detectron2's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_test_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

from ..errors import UserError
from ..program import command_line
from ..texts import shown
from .evaluation_loader import EvaluationLoader
from .files import is_address, missing_files, other_spelling
from .images import shown_size
from .mapper import SkipUnreadable
from .multi_image import MultiImageMapper
from .stream import GroupedStream, SeededDataset, TrainLoader
from .weak_strong import WeakStrongMapper

__all__ = ["build_test_loader", "build_train_loader"]

logger = logging.getLogger(__name__)

# Images whose header is looked at before training: a data set that disagrees with its folder
# mostly does so everywhere.
_SAMPLED = 32


def build_train_loader(
    *,
    dataset: list[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], dict[str, Any] | list[dict[str, Any]] | None],
    total_batch_size: int,
    num_workers: int = 4,
    skip_unreadable: bool = False,
    aspect_ratio_grouping: bool = True,
    sampler: Sampler | None = None,
    mix_until: int | None = None,
) -> TrainLoader:
    """As Detectron2's ``build_detection_train_loader``, an endless stream of batches.

    Order and augmentation follow from the sampler's seed (which comes from the main process'
    random numbers, and so from ``train.seed``) and from the position in the stream alone: not from
    the number of loader processes, nor from interruptions.

    Args:
        dataset: dataset dicts.
        mapper: dataset dict -> model input, or a list of several of one image. Then a batch has the
            first inputs of all its images, after them the second ones, and so on.
        total_batch_size: images a step over all processes.
        num_workers: loader processes of each process.
        skip_unreadable: count and skip images that cannot be read, instead of stopping.
        aspect_ratio_grouping: batch landscape and portrait images apart, to pad less.
        sampler: default: Detectron2's endless ``TrainingSampler``.
        mix_until: after so many images of the stream, a :class:`MultiImageMapper` takes each image
            by itself. None: never.

    Raises:
        ValueError: an empty data set, images of another size than it says, or a batch that the
            processes cannot share evenly, or a sampler that is none.
        FileNotFoundError: image files are missing; with ``skip_unreadable`` all of them.
    """
    if len(dataset) == 0:
        raise UserError("the training set has no images: check dataloader.train.dataset")
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise UserError(
            f"dataloader.train.total_batch_size={total_batch_size} cannot be shared evenly by "
            f"{world_size} process(es): use a positive multiple of {world_size}"
        )
    if sampler is not None and not isinstance(sampler, Sampler):
        raise UserError(
            f"dataloader.train.sampler is {type(sampler).__name__}, not a torch.utils.data.Sampler"
        )
    _check_files(dataset, mapper, "train", skip_missing=skip_unreadable)
    _check_sizes(dataset, mapper, "train")
    mixes = isinstance(mapper, MultiImageMapper)
    if mix_until is not None and not mixes:
        raise UserError(
            "train.mix_until is for a mapper that puts images together (MultiImageMapper), and "
            f"dataloader.train.mapper is {type(mapper).__name__}: set train.mix_until=1"
        )
    if isinstance(mapper, WeakStrongMapper):
        logger.info(
            "%d images a step are %d inputs of the model: every image enters %d times",
            total_batch_size,
            total_batch_size * len(mapper.view_names),
            len(mapper.view_names),
        )
    if skip_unreadable:
        # Several entries may share a file, which counts once when it cannot be read.
        mapper = SkipUnreadable(mapper, num_images=len({d["file_name"] for d in dataset}))
    stream = GroupedStream(
        TrainingSampler(len(dataset)) if sampler is None else sampler,
        [_is_portrait(d) if aspect_ratio_grouping else 0 for d in dataset],
        total_batch_size // world_size,
    )
    return TrainLoader(
        stream,
        SeededDataset(
            DatasetFromList(dataset, copy=False),
            mapper,
            seed=stream.seed,
            with_others=mixes,
            mix_until=mix_until,
        ),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def build_test_loader(
    *,
    dataset: list[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    batch_size: int = 1,
    num_workers: int = 4,
) -> EvaluationLoader:
    """Detectron2's ``build_detection_test_loader``: every image once, shared by the processes.

    Args:
        dataset: dataset dicts.
        mapper: dataset dict -> model input.
        batch_size: images a step of each process.
        num_workers: loader processes of each process.

    Raises:
        ValueError: an empty data set, or images of another size than it says.
        FileNotFoundError: image files are missing.
    """
    if len(dataset) == 0:
        raise UserError("the test set has no images: check dataloader.test.dataset")
    _check_files(dataset, mapper, "test")
    _check_sizes(dataset, mapper, "test")
    loader = build_detection_test_loader(
        dataset, mapper=mapper, batch_size=batch_size, num_workers=num_workers
    )
    return EvaluationLoader(loader, [str(d.get("file_name", "?")) for d in dataset])


def _check_files(
    dataset: list[dict[str, Any]], mapper: Callable, part: str, *, skip_missing: bool = False
) -> None:
    """Before the first step, not when the first missing image's turn comes."""
    if not isinstance(mapper, DatasetMapper):
        return  # for another mapper a file_name may be no file
    missing = missing_files(d["file_name"] for d in dataset)
    if not missing:
        return
    found = f"{len(missing)} of the {len(dataset)} images of dataloader.{part} are missing"
    if skip_missing and len(missing) < len(dataset):
        logger.warning("%s and will be skipped, the first one is %s", found, missing[0])
        return
    other = other_spelling(missing[0])
    raise FileNotFoundError(
        f"{found}, the first one is {missing[0]}"
        + (f" (there is {shown(other)})" if other is not None else "")
        + ": put them there, or take them out of the annotations"
        + (
            ", or set dataloader.train.skip_unreadable=true"
            if part == "train" and not skip_missing
            else ""
        )
    )


def _check_sizes(dataset: list[dict[str, Any]], mapper: Callable, part: str) -> None:
    """Whether annotations and images fit together, as far as some of the images' headers tell."""
    if not isinstance(mapper, DatasetMapper):
        return
    for record in dataset[:: max(1, len(dataset) // _SAMPLED)]:
        stated = (record.get("height"), record.get("width"))
        if None in stated or is_address(str(record["file_name"])):
            continue
        found = shown_size(record["file_name"])
        if found is not None and found != stated:
            raise UserError(
                f"image {shown(record['file_name'])} of dataloader.{part} is "
                f"{found[1]}x{found[0]} pixels, but its annotations are for "
                f"{stated[1]}x{stated[0]}: its boxes would be wrong. "
                f"`{command_line('check')}` lists all such images"
            )


def _is_portrait(record: dict[str, Any]) -> int:
    """As Detectron2 groups images: 0 for landscape, 1 for others."""
    return 0 if record.get("width", 0) > record.get("height", 0) else 1
