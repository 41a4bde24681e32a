"""From pictures to their detections, by an exported detector."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from ..data.batches import AnyPicture, as_picture, detect_in_batches
from ..data.mapper import augment, shown_frame
from ..errors import NonFinitePredictionError, UserError
from .runtime import open_onnx, open_runtime, run_session

__all__ = ["ExportedDetector", "OnnxPredictor"]

logger = logging.getLogger(__name__)


class OnnxPredictor:
    """Called as :class:`~detection_toolkit.engine.Predictor`, without config, weights and model.

    Attributes:
        description: what the file says about itself.
        metadata: with ``thing_classes``, where the file has class names.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        runtime: str = "onnxruntime",
    ):
        """
        Args:
            path: a file that ``tools/export.py --format onnx`` has written.
            threads: of the runtime; 0 leaves the number to it.
            providers: what ONNX Runtime computes with, see :func:`open_onnx`.
            runtime: "onnxruntime", or "openvino", on the CPU.

        Raises:
            ImportError: the runtime is missing.
            UserError: the installed ONNX Runtime lacks one of the providers.
            FileNotFoundError: no such file.
            ValueError: it is not such a file.
        """
        if runtime == "onnxruntime":
            opened = open_onnx(path, threads=threads, providers=providers)
        else:
            opened = open_runtime(path, runtime, threads=threads)
        self.session, self.description = opened
        self.metadata = Metadata()
        if self.description.class_names is not None:
            self.metadata.thing_classes = list(self.description.class_names)
        self._augmentations = self.description.augmentations()

    def __call__(self, original_image: AnyPicture) -> dict[str, Instances]:
        """
        Args:
            original_image: (H, W, 3) uint8 picture in BGR order, as OpenCV reads it; or a file, or
                a picture of Pillow.

        Returns:
            {"instances": Instances}, with ``pred_boxes`` in pixels of the given picture,
            ``scores`` and ``pred_classes``, best first.

        Raises:
            ValueError: not a picture of three channels.
            UnreadableImageError: the picture is too thin to be resized.
            NonFinitePredictionError: no detection is finite.
            UserError: the graph fails, or gives something else than detections.
        """
        picture = as_picture(original_image)
        return {"instances": self._detect([self._preprocess(picture)])[0]}

    def predict(
        self, images: AnyPicture | Iterable[AnyPicture], *, batch_size: int = 1
    ) -> Iterator[Instances]:
        """Detect in many pictures, a batch at a time.

        Arguments and results are those of :meth:`detection_toolkit.engine.Predictor.predict`.

        Raises:
            UserError, ValueError, UnreadableImageError: see there.
            NonFinitePredictionError, UserError: see :meth:`__call__`.
        """
        return detect_in_batches(images, batch_size, self._preprocess, self._detect)

    def _preprocess(self, picture: np.ndarray) -> dict[str, Any]:
        """Resized "image" (3, H, W); detections are scaled to "height" and "width"."""
        image = picture[:, :, ::-1] if self.description.image_format == "RGB" else picture
        augmented = T.AugInput(np.ascontiguousarray(image))
        transforms = augment(self._augmentations, augmented)
        resized = augmented.image
        height, width = shown_frame(transforms, picture.shape[:2], resized.shape[:2])
        return {"image": resized.transpose(2, 0, 1), "height": height, "width": width}

    def _detect(self, inputs: Sequence[Mapping[str, Any]]) -> list[Instances]:
        """Of images of one size."""
        images = np.stack([given["image"] for given in inputs])
        size = images.shape[2:]
        outputs = run_session(self.session, images, np.array([size] * len(images)))
        names = self.description.class_names
        return [
            detector_postprocess(
                finite_detections(*(x[i : i + 1] for x in outputs), size, names),
                given["height"],
                given["width"],
            )
            for i, given in enumerate(inputs)
        ]


class ExportedDetector(nn.Module):
    """An exported file in the place of a detector, for loaders and evaluators of Detectron2."""

    def __init__(self, run: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]):
        """
        Args:
            run: images (1, 3, H, W) uint8 and their sizes (1, 2) -> boxes, scores, labels, as
                :func:`run_session` does.
        """
        super().__init__()
        self._run = run

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: as a mapper returns them, on the CPU.

        Raises:
            NonFinitePredictionError: no detection of an image is finite.
        """
        found = []
        for inputs in batched_inputs:
            image = inputs["image"]
            size = tuple(image.shape[-2:])
            outputs = self._run(image[None].numpy(), np.array([size]))
            instances = finite_detections(*outputs, size)
            wanted = inputs.get("height", size[0]), inputs.get("width", size[1])
            found.append({"instances": detector_postprocess(instances, *wanted)})
        return found


def finite_detections(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int],
    class_names: Sequence[str] | None = None,
) -> Instances:
    """What an exported file has found on the one image that it was given.

    Args:
        boxes: (1, D, 4) ``xyxy`` in pixels.
        scores, labels: (1, D).
        size: height and width of the image.
        class_names: of the labels.

    Raises:
        NonFinitePredictionError: no detection is finite.
        UserError: a label has no name.
    """
    boxes, scores, labels = (torch.from_numpy(x[0]) for x in (boxes, scores, labels))
    # As in QueryDetector.inference. A file of an older version may hold NaN.
    usable = boxes.isfinite().all(1) & (scores >= 0)
    if not usable.any():
        raise NonFinitePredictionError(
            [(-1, 0)], images=["0"], advice="The exported weights have diverged."
        )
    if not usable.all():
        logger.warning(
            "%d of %d detections are NaN or infinite and are dropped",
            int((~usable).sum()),
            len(usable),
        )
    top = np.inf if class_names is None else len(class_names)
    if bool(((labels[usable] < 0) | (labels[usable] >= top)).any()):
        raise UserError(
            f"the ONNX model gives labels from {int(labels[usable].min())} to "
            f"{int(labels[usable].max())}, and describes {top} classes from 0 on"
        )
    return Instances(
        size,
        pred_boxes=Boxes(boxes[usable]),
        scores=scores[usable],
        pred_classes=labels[usable],
    )
