"""Several annotated images made one: side by side (mosaic), or one shining through another (mixup).

Every random number comes from NumPy's global generator, which the stream of training images seeds
for each image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from ..errors import UserError
from .copy_paste import AnnotatedImage, boxes_of_masks, count_pixels

__all__ = ["MixUp", "Mosaic"]


@dataclasses.dataclass(frozen=True)
class _Visibility:
    """Which objects are kept after they were made smaller and cut off.

    What is seen of an object is counted in pixels of its mask, and without masks of its box.
    """

    min_pixels: float
    """That must be seen."""
    min_visible: float
    """Share of the object, at its new size, that must be seen."""

    def __post_init__(self) -> None:
        if self.min_pixels < 0 or not 0 <= self.min_visible <= 1:
            raise UserError(
                "min_pixels must not be negative and min_visible be a share, got "
                f"{self.min_pixels} and {self.min_visible}"
            )

    def select(self, image: AnnotatedImage, whole: np.ndarray) -> AnnotatedImage:
        """
        Args:
            image: with what is left of N objects.
            whole: (N,) pixels of them before they were cut off.
        """
        seen = _areas(image)
        kept = (seen >= max(self.min_pixels, 1e-3)) & (seen >= self.min_visible * whole)
        return image.select(kept)


class Mosaic:
    """Four images around one point, as in YOLOv4: smaller objects in other surroundings.

    The result has the size of the first image. The point is drawn within it; each image is made
    smaller by a factor of its own and put into one of the four rectangles around the point, with
    a corner at the point, so that what does not fit is cut off on the outside. Boxes are cut off
    with it; with masks, those of cut objects become the boxes of what is seen of their masks.
    """

    num_others = 3

    def __init__(
        self,
        prob: float = 1.0,
        *,
        center: tuple[float, float] = (0.25, 0.75),
        scale: tuple[float, float] = (0.5, 1.0),
        min_pixels: float = 16,
        min_visible: float = 0.1,
        fill: int = 114,
    ):
        """
        Args:
            prob: share of the images that are made one.
            center: range of the point, as shares of width and height.
            scale: range of the factors by which images are made smaller.
            min_pixels: an object is dropped of which fewer pixels are seen.
            min_visible: an object is dropped of which a smaller share is seen.
            fill: value where no image is.

        Raises:
            UserError: a value out of its range.
        """
        self.prob = checked_share(prob, "prob")
        if not 0 <= center[0] <= center[1] <= 1:
            raise UserError(f"center must be two shares in order, got {list(center)}")
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale must be two positive factors in order, got {list(scale)}")
        self.center = (float(center[0]), float(center[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.visibility = _Visibility(min_pixels, min_visible)
        self.fill = fill

    def __call__(self, image: AnnotatedImage, others: Sequence[AnnotatedImage]) -> AnnotatedImage:
        """One image of four; none of them is changed.

        Args:
            image: the first one, at the upper left.
            others: three, with masks if the first one has them.
        """
        height, width = image.size
        x, y = (round(np.random.uniform(*self.center) * side) for side in (width, height))
        canvas = np.full_like(image.image, self.fill)
        parts = []
        for nth, part in enumerate([image, *others]):
            factor = np.random.uniform(*self.scale)
            part = _resized(part, [max(1, round(factor * side)) for side in part.size])
            is_right, is_lower = nth % 2 == 1, nth >= 2
            left = x if is_right else x - part.size[1]
            top = y if is_lower else y - part.size[0]
            region = (
                x if is_right else 0,
                y if is_lower else 0,
                width if is_right else x,
                height if is_lower else y,
            )
            parts.append(_placed(part, canvas, (left, top), region, self.visibility))
        return _joined(canvas, parts)


class MixUp:
    """A second image that shines through: ``lambda * image + (1 - lambda) * other``.

    Lambda is of Beta(``alpha``, ``alpha``). The second image is made smaller where it is larger
    than the first one, and put at a random place within it; around it the first one stays as it is.
    The objects of both count in full.
    """

    num_others = 1

    def __init__(self, prob: float = 1.0, *, alpha: float = 32.0, min_pixels: float = 16):
        """
        Args:
            prob: share of the images that are mixed.
            alpha: the larger, the nearer is lambda to one half.
            min_pixels: an object of the second image is dropped that has fewer pixels.

        Raises:
            UserError: a value out of its range.
        """
        self.prob = checked_share(prob, "prob")
        if not alpha > 0:
            raise UserError(f"alpha must be positive, got {alpha}")
        self.alpha = alpha
        self.visibility = _Visibility(min_pixels, 0.0)

    def __call__(self, image: AnnotatedImage, others: Sequence[AnnotatedImage]) -> AnnotatedImage:
        """One image of two; none of them is changed.

        Args:
            image: the first one.
            others: the second one, with masks if the first one has them.
        """
        (other,) = others
        share = float(np.random.beta(self.alpha, self.alpha))
        height, width = image.size
        factor = min(1.0, height / other.size[0], width / other.size[1])
        other = _resized(other, [max(1, int(factor * side)) for side in other.size])
        top = np.random.randint(height - other.size[0] + 1)
        left = np.random.randint(width - other.size[1] + 1)
        canvas = image.image.copy()
        seen = canvas[top : top + other.size[0], left : left + other.size[1]]
        mixed = cv2.addWeighted(seen, share, other.image, 1 - share, 0)
        other = dataclasses.replace(other, image=mixed)
        frame = (0, 0, width, height)
        return _joined(canvas, [image, _placed(other, canvas, (left, top), frame, self.visibility)])


def checked_share(value: float, name: str) -> float:
    """The value.

    Raises:
        UserError: it is no share.
    """
    if not 0 <= value <= 1:
        raise UserError(f"{name} must be from 0 to 1, got {value}")
    return float(value)


def _areas(image: AnnotatedImage) -> np.ndarray:
    """(N,) pixels of the objects' masks, and without masks of their boxes."""
    if image.masks is not None:
        return count_pixels(image.masks)
    return (image.boxes[:, 2:] - image.boxes[:, :2]).clip(min=0).prod(1)


def _resized(image: AnnotatedImage, size: Sequence[int]) -> AnnotatedImage:
    """At another size (height, width)."""
    height, width = size
    if (height, width) == image.size:
        return image
    is_smaller = height * width < image.size[0] * image.size[1]
    method = cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR

    def resize(values: np.ndarray) -> np.ndarray:
        return cv2.resize(np.ascontiguousarray(values), (width, height), interpolation=method)

    masks = image.masks
    if masks is not None:
        small = [resize(mask.astype(np.uint8) * 255) > 127 for mask in masks]
        masks = np.array(small, dtype=bool).reshape(-1, height, width)
    scale = np.array([width / image.size[1], height / image.size[0]] * 2)
    return dataclasses.replace(
        image, image=resize(image.image), boxes=image.boxes * scale, masks=masks
    )


def _placed(
    image: AnnotatedImage,
    canvas: np.ndarray,
    corner: tuple[int, int],
    region: tuple[int, int, int, int],
    visibility: _Visibility,
) -> AnnotatedImage:
    """Put an image onto a canvas, in place; returns the canvas with the image's objects alone.

    Args:
        image: to be put there.
        canvas: (H, W, 3).
        corner: (x, y) of the image's upper left corner on the canvas, perhaps outside of it.
        region: ``xyxy`` within the canvas, outside of which the image is cut off.
        visibility: which objects are kept.
    """
    (x, y), (height, width) = corner, image.size
    x0, y0 = max(region[0], x), max(region[1], y)
    x1, y1 = max(min(region[2], x + width), x0), max(min(region[3], y + height), y0)
    there = np.s_[y0:y1, x0:x1]
    here = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
    canvas[there] = image.image[here]
    boxes = (image.boxes + (x, y, x, y)).clip((x0, y0, x0, y0), (x1, y1, x1, y1))
    whole, masks = _areas(image), None
    if image.masks is not None:
        masks = np.zeros((len(boxes), *canvas.shape[:2]), dtype=bool)
        masks[(slice(None), *there)] = image.masks[(slice(None), *here)]
        is_cut = count_pixels(masks) < whole
        boxes[is_cut] = boxes_of_masks(masks[is_cut])
    return visibility.select(AnnotatedImage(canvas, boxes, image.classes, masks), whole)


def _joined(canvas: np.ndarray, parts: Sequence[AnnotatedImage]) -> AnnotatedImage:
    """An image with the objects of several."""
    masks = None
    if all(part.masks is not None for part in parts):
        masks = np.concatenate([part.masks for part in parts if part.masks is not None])
    return AnnotatedImage(
        canvas,
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.classes for part in parts]),
        masks,
    )
