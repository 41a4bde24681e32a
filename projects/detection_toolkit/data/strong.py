"""Strong augmentation: one colour operation, one geometric operation, erased patches.

Every random number comes from NumPy's global generator, as in Detectron2's augmentations, which the
stream of training images seeds for each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
from detectron2.data.transforms import (
    AugInput,
    Augmentation,
    AugmentationList,
    PILColorTransform,
    Transform,
    TransformList,
)
from PIL import Image, ImageEnhance, ImageOps

from ..errors import UserError

__all__ = [
    "COLOR_OPERATIONS",
    "GEOMETRIC_OPERATIONS",
    "ColorOperation",
    "ErasingTransform",
    "GeometricOperation",
    "InRandomOrder",
    "RandomColorOperation",
    "RandomErasing",
    "RandomGeometricOperation",
]

_BLENDS = {
    "sharpness": ImageEnhance.Sharpness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
}
# Range of the magnitude; None: the operation has none.
_COLOR_RANGES: dict[str, tuple[float, float] | None] = {
    "none": None,
    "autocontrast": None,
    "equalize": None,
    "posterize": (0.0, 4.0),
    "solarize": (0.0, 256.0),
    **{name: (0.1, 1.9) for name in _BLENDS},
}
_GEOMETRIC_RANGES = {
    "rotate": (0.0, 30.0),
    "shear_x": (0.0, 30.0),
    "shear_y": (0.0, 30.0),
    "translate_x": (0.0, 0.1),
    "translate_y": (0.0, 0.1),
}
COLOR_OPERATIONS = tuple(_COLOR_RANGES)
"""Names of the nine colour operations, "none" among them."""
GEOMETRIC_OPERATIONS = tuple(_GEOMETRIC_RANGES)
"""Names of the five geometric operations."""


def _draw_magnitude(low: float, high: float) -> float:
    """Uniform, rounded to one decimal."""
    return round(float(np.random.uniform(low, high)), 1)


def _check_names(names: Sequence[str], known: Sequence[str], argument: str) -> tuple[str, ...]:
    names = tuple(names)
    if not names or not set(names) <= set(known):
        raise UserError(f"{argument} must be some of {', '.join(known)}; got {list(names)}")
    return names


class ColorOperation(PILColorTransform):
    """One of :data:`COLOR_OPERATIONS`, by Pillow; coordinates and masks stay."""

    def __init__(self, name: str, magnitude: float | None, image_format: str = "RGB"):
        """
        Args:
            name: of the operation.
            magnitude: "posterize" keeps as many bits, rounded up; "solarize" inverts values from it
                on; the others blend with the picture (1) away from what lacks the property (0).
            image_format: "RGB" or "BGR".
        """
        self.name = name
        self.magnitude = magnitude
        self.image_format = image_format
        super().__init__(self._function(name, magnitude))

    @staticmethod
    def _function(name: str, magnitude: float | None) -> Callable[[Image.Image], Image.Image]:
        if name == "none":
            return lambda picture: picture
        if name == "autocontrast":
            return ImageOps.autocontrast
        if name == "equalize":
            return ImageOps.equalize
        assert magnitude is not None
        if name == "posterize":
            return partial(ImageOps.posterize, bits=math.ceil(magnitude))
        if name == "solarize":
            # Pillow's type is too narrow: it compares with the threshold only.
            return partial(ImageOps.solarize, threshold=magnitude)  # type: ignore[arg-type]
        return lambda picture: _BLENDS[name](picture).enhance(magnitude)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """
        Args:
            img: (H, W, 3) uint8.
        """
        if self.image_format == "RGB":
            return super().apply_image(np.ascontiguousarray(img))
        return super().apply_image(np.ascontiguousarray(img[..., ::-1]))[..., ::-1]


class RandomColorOperation(Augmentation):
    """One of several colour operations, all as likely, of a random magnitude."""

    def __init__(self, operations: Sequence[str] = COLOR_OPERATIONS, *, image_format: str = "RGB"):
        """
        Args:
            operations: names among :data:`COLOR_OPERATIONS`.
            image_format: of the images, "RGB" or "BGR".

        Raises:
            UserError: another name or format.
        """
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise UserError(f"image_format must be RGB or BGR, it is {image_format!r}")
        self.operations = _check_names(operations, COLOR_OPERATIONS, "operations")
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> Transform:
        """A :class:`ColorOperation` with its magnitude drawn."""
        name = self.operations[np.random.randint(len(self.operations))]
        limits = _COLOR_RANGES[name]
        magnitude = None if limits is None else _draw_magnitude(*limits)
        return ColorOperation(name, magnitude, self.image_format)


class GeometricOperation(Transform):
    """One of :data:`GEOMETRIC_OPERATIONS`, by OpenCV's ``warpAffine``; the size stays.

    The operation moves the centres of pixels, the first of which is the origin, so that
    coordinates, whose origin is that pixel's corner, move with what they belong to.
    """

    def __init__(self, name: str, magnitude: float, height: int, width: int, *, fill: int = 128):
        """
        Args:
            name: of the operation.
            magnitude: degrees of "rotate" (counter-clockwise) and "shear_x", "shear_y"; a share of
                the side for "translate_x", "translate_y".
            height, width: of the image in pixels.
            fill: value of pixels that come from outside of the image; masks are 0 there.
        """
        super().__init__()
        self.name = name
        self.magnitude = magnitude
        self.height = height
        self.width = width
        self.fill = fill
        self._centers = self._matrix()
        linear, offset = self._centers[:, :2], self._centers[:, 2]
        self._linear = linear
        self._offset = offset + 0.5 - linear @ (0.5, 0.5)

    def _matrix(self) -> np.ndarray:
        """(2, 3): where the centres of pixels go."""
        if self.name == "rotate":
            center = ((self.width - 1) / 2, (self.height - 1) / 2)
            return cv2.getRotationMatrix2D(center, self.magnitude, 1.0)
        matrix = np.eye(2, 3)
        if self.name.startswith("shear"):
            row, column = (0, 1) if self.name == "shear_x" else (1, 0)
            matrix[row, column] = math.tan(math.radians(self.magnitude))
        elif self.name == "translate_x":
            matrix[0, 2] = self.magnitude * self.width
        else:
            matrix[1, 2] = self.magnitude * self.height
        return matrix

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """
        Args:
            img: (H, W, 3) uint8; interpolated bilinearly.
        """
        return self._warp(img, cv2.INTER_LINEAR, self.fill)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """
        Args:
            segmentation: (H, W) uint8 or bool; the nearest value is taken.
        """
        values = segmentation.astype(np.uint8)
        return self._warp(values, cv2.INTER_NEAREST, 0).astype(segmentation.dtype)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """
        Args:
            coords: (M, 2) x, y in pixels.
        """
        return coords @ self._linear.T + self._offset

    def _warp(self, values: np.ndarray, interpolation: int, fill: int) -> np.ndarray:
        return cv2.warpAffine(
            np.ascontiguousarray(values),
            self._centers,
            (self.width, self.height),
            flags=interpolation,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(fill, fill, fill),
        )


class RandomGeometricOperation(Augmentation):
    """One of several geometric operations, all as likely, of a random magnitude and sign."""

    def __init__(self, operations: Sequence[str] = GEOMETRIC_OPERATIONS, *, fill: int = 128):
        """
        Args:
            operations: names among :data:`GEOMETRIC_OPERATIONS`.
            fill: value of pixels that come from outside of the image.

        Raises:
            UserError: another name.
        """
        super().__init__()
        self.operations = _check_names(operations, GEOMETRIC_OPERATIONS, "operations")
        self.fill = fill

    def get_transform(self, image: np.ndarray) -> Transform:
        """A :class:`GeometricOperation` for an image of (H, W, 3)."""
        name = self.operations[np.random.randint(len(self.operations))]
        magnitude = _draw_magnitude(*_GEOMETRIC_RANGES[name])
        sign = 1 if np.random.randint(2) else -1
        height, width = image.shape[:2]
        return GeometricOperation(name, sign * magnitude, height, width, fill=self.fill)


class ErasingTransform(Transform):
    """Patches of one value; coordinates stay, and masks have nothing there."""

    def __init__(self, patches: np.ndarray, *, fill: int = 128):
        """
        Args:
            patches: (P, 4) ``xyxy`` in whole pixels.
            fill: their value.
        """
        super().__init__()
        self.patches = np.asarray(patches, dtype=np.int64).reshape(-1, 4)
        self.fill = fill

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """
        Args:
            img: (H, W, 3) uint8; it is not changed.
        """
        return self._erase(img, self.fill)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """
        Args:
            segmentation: (H, W) uint8 or bool; it is not changed.
        """
        return self._erase(segmentation, 0)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """The coordinates as they are."""
        return coords

    def covered_share(self, boxes: np.ndarray) -> np.ndarray:
        """(M,) share of the area of boxes (M, 4) ``xyxy`` that is erased; 0 for empty boxes.

        Where patches overlap, their area counts once.
        """
        xs, ys = (np.unique(self.patches[:, [k, k + 2]]) for k in (0, 1))
        covered = np.zeros(len(boxes))
        for y0, y1 in zip(ys[:-1], ys[1:]):
            for x0, x1 in zip(xs[:-1], xs[1:]):
                # No patch begins or ends within the cell.
                around = (self.patches[:, :2] <= (x0, y0)) & (self.patches[:, 2:] >= (x1, y1))
                if around.all(1).any():
                    sides = np.minimum(boxes[:, 2:], (x1, y1)) - np.maximum(boxes[:, :2], (x0, y0))
                    covered += sides.clip(min=0).prod(1)
        areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)
        return np.divide(covered, areas, out=np.zeros(len(boxes)), where=areas > 0)

    def _erase(self, values: np.ndarray, fill: int) -> np.ndarray:
        values = values.copy()
        for x0, y0, x1, y1 in self.patches:
            values[y0:y1, x0:x1] = fill
        return values


class RandomErasing(Augmentation):
    """Several patches of the image's own aspect ratio, at random places."""

    def __init__(
        self,
        patches: tuple[int, int] = (1, 5),
        side: tuple[float, float] = (0.0, 0.2),
        *,
        fill: int = 128,
    ):
        """
        Args:
            patches: smallest and largest number of patches, all as likely.
            side: smallest and largest share of the image's height and width that a patch has.
            fill: their value.

        Raises:
            UserError: a range that is none.
        """
        super().__init__()
        if not 0 <= patches[0] <= patches[1]:
            raise UserError(f"patches must be two numbers in order, got {list(patches)}")
        if not 0 <= side[0] <= side[1] <= 1:
            raise UserError(f"side must be two shares in order, got {list(side)}")
        self.patches = (int(patches[0]), int(patches[1]))
        self.side = (float(side[0]), float(side[1]))
        self.fill = fill

    def get_transform(self, image: np.ndarray) -> Transform:
        """An :class:`ErasingTransform` for an image of (H, W, 3)."""
        height, width = image.shape[:2]
        patches = []
        for _ in range(np.random.randint(self.patches[0], self.patches[1] + 1)):
            share = np.random.uniform(*self.side)
            h, w = int(height * share), int(width * share)
            x, y = np.random.randint(width - w + 1), np.random.randint(height - h + 1)
            patches.append((x, y, x + w, y + h))
        return ErasingTransform(np.array(patches), fill=self.fill)


class InRandomOrder(AugmentationList):
    """Detectron2's ``AugmentationList``, in another order for every image."""

    def __call__(self, aug_input: AugInput) -> Transform:
        """Apply the augmentations in place; returns what they did, in their order."""
        order = np.random.permutation(len(self.augs))
        return TransformList([self.augs[i](aug_input) for i in order])
