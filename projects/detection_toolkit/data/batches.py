"""Pictures that go through a detector together."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.structures import Instances

from ..errors import UserError
from .images import check_picture, read_image

__all__ = ["as_picture", "detect_in_batches"]


def as_picture(image: np.ndarray | str | os.PathLike[str]) -> np.ndarray:
    """A BGR picture (H, W, 3), read if it is a file.

    Raises:
        ValueError: not a picture of three channels.
        UnreadableImageError: the file is missing or cannot be decoded.
    """
    if isinstance(image, (str, os.PathLike)):
        image = read_image(image, "BGR")
    check_picture(image)
    return image


def detect_in_batches(
    images: Iterable[np.ndarray | str | os.PathLike[str]],
    batch_size: int,
    preprocess: Callable[[np.ndarray], Mapping[str, Any]],
    detect: Callable[[Sequence[Mapping[str, Any]]], Sequence[Instances]],
) -> Iterator[Instances]:
    """Detections of each picture, in order; no more than a batch is in memory.

    Those of a batch that have one size once they are resized go through the network together.
    Others do not: padding them to one size would change what is found.

    Args:
        images: files, or (H, W, 3) BGR pictures; a generator may make them.
        batch_size: at most so many go through the network together.
        preprocess: one picture -> the detector's input, whose "image" has a ``shape``.
        detect: inputs of one shape -> the detections of each.

    Raises:
        UserError: a batch of less than one picture.
        ValueError: not a picture of three channels.
        UnreadableImageError: a picture is too thin to be resized, or a file is missing or cannot
            be decoded.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, batch_size)):
        inputs = [preprocess(as_picture(image)) for image in batch]
        sizes: dict[tuple[int, ...], list[int]] = {}
        for i, given in enumerate(inputs):
            sizes.setdefault(tuple(given["image"].shape), []).append(i)
        found: dict[int, Instances] = {}
        for members in sizes.values():
            found.update(zip(members, detect([inputs[i] for i in members])))
        yield from (found[i] for i in range(len(batch)))
