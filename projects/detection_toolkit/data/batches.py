"""Pictures that go through a detector together."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.structures import Instances
from PIL import Image

from ..errors import UserError
from ..texts import shown
from .images import check_picture, named_if_unreadable, read_image, to_array

__all__ = ["AnyPicture", "as_picture", "detect_in_batches", "each_picture"]

AnyPicture = np.ndarray | str | os.PathLike[str] | Image.Image
"""A BGR picture (H, W, 3), a file, or a picture of Pillow."""


def as_picture(image: AnyPicture) -> np.ndarray:
    """A BGR picture (H, W, 3), read if it is a file; one of Pillow is turned as its EXIF data say.

    Raises:
        ValueError: not a picture of three channels.
        UnreadableImageError: the file is missing, or it or Pillow's picture cannot be decoded.
    """
    if isinstance(image, (str, os.PathLike)):
        image = read_image(image, "BGR")
    elif isinstance(image, Image.Image):
        with named_if_unreadable(shown(getattr(image, "filename", "") or "of Pillow")):
            image = to_array(image, "BGR")
    check_picture(image)
    return image


def each_picture(images: AnyPicture | Iterable[AnyPicture]) -> Iterable[AnyPicture]:
    """Many pictures as they are, and one as a list of itself."""
    is_array = isinstance(images, np.ndarray) and images.ndim < 4
    if is_array or isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    return images


def detect_in_batches(
    images: AnyPicture | Iterable[AnyPicture],
    batch_size: int,
    preprocess: Callable[[np.ndarray], Mapping[str, Any]],
    detect: Callable[[Sequence[Mapping[str, Any]]], Sequence[Instances]],
) -> Iterator[Instances]:
    """Detections of each picture, in order; no more than a batch is in memory.

    Those of a batch that have one size once they are resized go through the network together.
    Others do not: padding them to one size would change what is found.

    Args:
        images: files, (H, W, 3) BGR pictures, or Pillow's; a generator may make them. Or one.
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
    remaining = iter(each_picture(images))
    while batch := list(itertools.islice(remaining, batch_size)):
        inputs = [preprocess(as_picture(image)) for image in batch]
        sizes: dict[tuple[int, ...], list[int]] = {}
        for i, given in enumerate(inputs):
            sizes.setdefault(tuple(given["image"].shape), []).append(i)
        found: dict[int, Instances] = {}
        for members in sizes.values():
            found.update(zip(members, detect([inputs[i] for i in members])))
        yield from (found[i] for i in range(len(batch)))
