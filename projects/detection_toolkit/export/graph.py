"""The detector as one function of tensors, and its graph.

Letters: B images, H and W pixels, D detections.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.structures import ImageList
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..defaults import INPUT_TYPES
from ..errors import UserError
from ..modeling import QueryDetector, require_query_detector
from ..modeling.execution import PLAIN

__all__ = ["DetectionGraph", "exportable_detector", "plain_attention", "trace"]


def exportable_detector(model_cfg: DictConfig, state: dict[str, Tensor]) -> QueryDetector:
    """A detector on the CPU that computes with operators that can be exported.

    Args:
        model_cfg: ``cfg.model``, not changed.
        state: state dict of the detector as trained.

    Raises:
        UserError: the config is not one of a :class:`QueryDetector`.
    """
    model_cfg = copy.deepcopy(model_cfg)
    if "execution" not in model_cfg:
        raise UserError(
            "only query-based detectors can be exported, whose config has model.execution; this "
            f"one describes a {getattr(model_cfg.get('_target_'), '__name__', 'model of others')}"
        )
    model_cfg.execution.update(PLAIN)  # consists of operators that ONNX has
    detector = require_query_detector(instantiate(model_cfg), "an export")
    detector.load_state_dict(state)
    return detector.eval().requires_grad_(False)


class DetectionGraph(nn.Module):
    """From a batch of images to detections, with nothing but tensors.

    Images of a batch may differ in size: they stand in the upper left corner, and what is right of
    and below them counts as padding whatever its values. The batch is padded further to the
    detector's size divisibility.
    """

    def __init__(self, detector: QueryDetector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: (B, 3, H, W) of 0..255, float32 or uint8, in the detector's channel order.
            image_sizes: (B, 2) int64, height and width of each image.

        Returns:
            boxes (B, D, 4) ``xyxy`` in pixels of the images, clipped to them; scores (B, D); labels
            (B, D) int64; best first. What is not finite comes last, with a score of -1.
        """
        detector = self.detector
        height, width = images.shape[-2:]
        heights, widths = image_sizes[:, 0, None, None, None], image_sizes[:, 1, None, None, None]
        rows = torch.arange(height, device=images.device)[:, None]
        columns = torch.arange(width, device=images.device)
        inside = (rows < heights) & (columns < widths)  # (B, 1, H, W)
        normalised = images.to(detector.pixel_mean.dtype) - detector.pixel_mean
        normalised = normalised / detector.pixel_std
        # Eager padding is zero after normalisation.
        batch = torch.where(inside, normalised, torch.zeros_like(normalised))
        divisor = detector.size_divisibility
        if divisor > 1:
            batch = F.pad(batch, (0, -width % divisor, 0, -height % divisor))
        stages = detector.predict(ImageList(batch, image_sizes)).stages
        output = stages[detector.answering_stage]
        boxes, scores, labels, _ = detector.select_detections(output)
        limits = image_sizes.to(boxes.dtype).flip(-1).repeat(1, 2)[:, None]  # (B, 1, 4): w h w h
        return torch.minimum(boxes.clamp(min=0), limits), scores, labels


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention of simple operators, instead of fused ones, whose layouts do not export."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def trace(
    detector: QueryDetector,
    *,
    input_type: str = "float32",
    example_size: tuple[int, int] = (96, 160),
) -> torch.export.ExportedProgram:
    """The graph of a detector, for any batch and image size.

    Args:
        detector: as :func:`exportable_detector` makes it.
        input_type: "float32" or "uint8".
        example_size: height and width of the images that are traced; any will do, and small ones
            take less memory.

    Raises:
        ValueError: another input type.
    """
    if input_type not in INPUT_TYPES:
        raise UserError(f"input type {input_type!r} is not one of {', '.join(INPUT_TYPES)}")
    height, width = example_size
    images = torch.zeros(2, 3, height, width, dtype=getattr(torch, input_type))
    sizes = torch.tensor([[height, width], [height - 7, width - 5]])
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad(), plain_attention():
        return torch.export.export(
            DetectionGraph(detector).eval(),
            (images, sizes),
            dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic}),
        )
