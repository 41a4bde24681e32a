"""Resizing with OpenCV, as the official weights were trained with.

Detectron2 resizes with Pillow, whose bilinear filter widens when it shrinks an image
(antialiasing). OpenCV's reads four pixels whatever the scale, in fixed point for 8-bit images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data.transforms import (
    ResizeScale,
    ResizeShortestEdge,
    ResizeTransform,
    Transform,
)

__all__ = ["OpenCVResizeScale", "OpenCVResizeShortestEdge", "OpenCVResizeTransform"]


class OpenCVResizeTransform(ResizeTransform):
    """Detectron2's ``ResizeTransform`` with OpenCV's bilinear interpolation of the image.

    Coordinates and segmentation masks are treated as there.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int):
        """
        Args:
            h, w: size of the image in pixels.
            new_h, new_w: size to reach.
        """
        super().__init__(h, w, new_h, new_w)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """
        Args:
            img: (H, W) or (H, W, C), uint8 or floating point.
            interp: a Pillow method, which only segmentation masks ask for; None is OpenCV's
                bilinear interpolation.

        Raises:
            ValueError: the image has another size than this transform was made for.
        """
        if interp is not None:
            return super().apply_image(img, interp)
        if img.shape[:2] != (self.h, self.w):
            raise ValueError(
                f"this transform resizes images of {self.h}x{self.w} pixels (height x width), "
                f"got {img.shape[0]}x{img.shape[1]}"
            )
        resized = cv2.resize(
            np.ascontiguousarray(img), (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR
        )
        # OpenCV drops a channel dimension of one.
        return resized if resized.ndim == img.ndim else resized[..., None]

    def inverse(self) -> Transform:
        """The transform back to the former size."""
        return OpenCVResizeTransform(self.new_h, self.new_w, self.h, self.w)


class OpenCVResizeShortestEdge(ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge`` with OpenCV's bilinear interpolation."""

    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
    ):
        """
        Args:
            short_edge_length: pixels of the shorter side; with ``sample_style="range"`` the
                lowest and highest, with ``"choice"`` all candidates.
            max_size: the longer side never exceeds it.
            sample_style: ``"range"`` or ``"choice"``.
        """
        super().__init__(short_edge_length, max_size, sample_style)

    def get_transform(self, image: np.ndarray) -> Transform:
        """The transform for an image of (H, W) or (H, W, C)."""
        transform = super().get_transform(image)
        if not isinstance(transform, ResizeTransform):
            return transform
        return OpenCVResizeTransform(transform.h, transform.w, transform.new_h, transform.new_w)


class OpenCVResizeScale(ResizeScale):
    """Detectron2's ``ResizeScale`` with OpenCV's bilinear interpolation.

    The image is resized to fit into the target, whose sides are first multiplied by one random
    number.
    """

    def __init__(self, min_scale: float, max_scale: float, target_height: int, target_width: int):
        """
        Args:
            min_scale, max_scale: of the random number, uniform.
            target_height, target_width: in pixels.
        """
        super().__init__(min_scale, max_scale, target_height, target_width)

    def get_transform(self, image: np.ndarray) -> Transform:
        """The transform for an image of (H, W) or (H, W, C)."""
        transform = super().get_transform(image)
        return OpenCVResizeTransform(transform.h, transform.w, transform.new_h, transform.new_w)
