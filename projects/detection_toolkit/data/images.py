"""Reading images as they come: any mode, any content, of any origin."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from detectron2.data.detection_utils import (
    _EXIF_ORIENT as EXIF_ORIENTATION,
)
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..defaults import MAX_PIXELS
from ..errors import UserError
from ..texts import shown
from ..trust import names_pickle

__all__ = [
    "EXIF_ORIENTATION",
    "MAX_PIXELS",
    "PICTURE_FORMATS",
    "PICTURE_SUFFIXES",
    "UnreadableImageError",
    "check_picture",
    "is_animation",
    "named_if_unreadable",
    "open_file",
    "open_picture",
    "read_image",
    "shown_size",
    "to_array",
]

# What a picture may be, whatever its name says. Pillow knows some forty more formats, among them
# PostScript, which it has another program execute, and decoders that few look after.
PICTURE_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
# Of the files in a folder that are taken for pictures.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
# What says nothing about the file: the machine has run short of something.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadableImageError(OSError):
    """An image file that is missing, cannot be decoded, or is of no use for a detector."""

    file_name: str | None = None
    """Of the file, where a mapper has raised it."""


def open_file(file_name: str | Path) -> IO[bytes]:
    """Open the file of an image, at a path or an address that Detectron2's ``PathManager`` knows.

    Raises:
        UserError: it is an address of what may be a pickle, which would be kept for checkpoints;
            or a pipe or device, which might never end.
        OSError: it cannot be opened.
    """
    path = os.fspath(file_name)
    if "://" in path and names_pickle(path):
        raise UserError("it is the address of a pickle, not of an image")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError("it is a pipe or a device, no file")
    return PathManager.open(path, "rb")


def open_picture(file: IO[bytes]) -> Image.Image:
    """Pillow's ``Image.open``, of the formats that pictures have.

    Raises:
        UnidentifiedImageError: it is of none of them.
    """
    try:
        return Image.open(file, formats=[f for f in PICTURE_FORMATS if f in _known_formats()])
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(
            f"cannot identify it as one of {', '.join(PICTURE_FORMATS)}"
        ) from error


@functools.cache
def _known_formats() -> frozenset[str]:
    """Some builds of Pillow lack a decoder."""
    Image.init()
    return frozenset(Image.OPEN)


def read_image(
    file_name: str | Path, image_format: str = "RGB", *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Detectron2's ``read_image``, with an outcome for every file.

    The orientation in EXIF data is applied. Grey, palette and CMYK images are converted,
    transparency is dropped, and of an animation the first picture is taken. Images of 16 bits a
    channel are scaled to 8. The content says what a file is, not the ending of its name.

    Args:
        file_name: path, or an address that Detectron2's ``PathManager`` knows.
        image_format: "RGB" or "BGR".
        max_pixels: larger images are refused before they are decoded.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UnreadableImageError: the file is missing, damaged, too large, or its numbers have no known
            range (32-bit integers, floating point); names the file.
        OSError: the machine is short of memory or of file handles.
        MemoryError: likewise.
    """
    with (
        named_if_unreadable(shown(file_name)),
        open_file(file_name) as file,
        _pillow_limit.at_least(max_pixels),
    ):
        image = open_picture(file)
        width, height = image.size
        if width * height > max_pixels:
            raise Image.DecompressionBombError(
                f"{width}x{height} pixels are more than the limit of {max_pixels}"
            )
        return to_array(image, image_format)


def is_animation(file_name: str | Path) -> bool:
    """Whether a file is a GIF or WebP of several pictures; not, where it cannot be read."""
    with contextlib.suppress(Exception), open_file(file_name) as file:
        return bool(getattr(open_picture(file), "is_animated", False))
    return False


@contextlib.contextmanager
def named_if_unreadable(name: str) -> Iterator[None]:
    """Within it an image is decoded, and what goes wrong is said of that name.

    Raises:
        UnreadableImageError: the image is at fault.
        OSError, MemoryError: the machine is short of memory or of file handles.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly everything
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            raise
        raise UnreadableImageError(
            f"image {name} cannot be read ({type(error).__name__}: {error})"
        ) from error


def to_array(image: Image.Image, image_format: str) -> np.ndarray:
    """A picture of Pillow as :func:`read_image` gives that of a file."""
    image = _apply_exif_orientation(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    return convert_PIL_to_numpy(image, image_format)


def check_picture(picture: np.ndarray) -> None:
    """
    Raises:
        ValueError: it is no (H, W, 3) array with something in it.
    """
    shape = np.shape(picture)
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise UserError(
            "expected a BGR picture, an array of shape (height, width, 3); got "
            f"{type(picture).__name__} of shape {shape} "
            "(cv2.imread returns None for a file that it cannot decode)"
        )


def shown_size(file_name: str | Path) -> tuple[int, int] | None:
    """(height, width) as an image is shown, from its header; None where that cannot be read."""
    try:
        with open_file(file_name) as file:
            image = open_picture(file)
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # whoever reads the image will say what is wrong with it
        return None
    return (width, height) if turned else (height, width)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits. Pillow's own conversion would cut off everything above 255."""
    values = np.asarray(image)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"its values (mode {image.mode}, {values.min()} to {values.max()}) have no known "
            "range; save it with 8 or 16 bits a channel"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


class _PillowLimit:
    """Pillow's one limit for all threads, at which it warns; it refuses at twice as much.

    While images are read, it is the largest that one of them may have; each reader looks at its
    own besides. Then it is again what it was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: list[int] = []
        self._before: int | None = None

    @contextlib.contextmanager
    def at_least(self, max_pixels: int) -> Iterator[None]:
        """While this lasts, Pillow takes images of so many pixels."""
        with self._lock:
            if not self._readers:
                self._before = Image.MAX_IMAGE_PIXELS
            self._readers.append(max_pixels)
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._readers.remove(max_pixels)
                self._apply()

    def _apply(self) -> None:
        Image.MAX_IMAGE_PIXELS = max(self._readers) if self._readers else self._before

    def forget_readers(self) -> None:
        """In a forked process, where the other threads, and what they hold, are gone."""
        self._lock = threading.Lock()
        if self._readers:
            self._readers.clear()
            self._apply()


# One for the process, as Pillow's limit is.
_pillow_limit = _PillowLimit()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pillow_limit.forget_readers)
