"""What the page shows, without the page: one forward pass a picture, then only drawing.

Letters: S stages, N queries.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image, UnidentifiedImageError

from ..data import ShapesSpec, UnreadableImageError, read_image
from ..data.shapes import render_image
from ..engine.predictor import Predictor
from ..errors import UserError
from ..texts import shown
from ..visualization import (
    StageTrace,
    draw_detections,
    draw_followed_query,
    draw_query_stages,
    resize_trace,
    select_confident,
    trace_stages,
)

__all__ = [
    "MAX_INPUT_PIXELS",
    "MAX_PIXELS",
    "Detection",
    "ExampleImages",
    "PictureRefused",
    "StageViewer",
    "ViewedPicture",
    "coco_results",
    "list_detections",
]

MAX_PIXELS = 64_000_000
"""Of an upload: more than any camera makes, and less than would fill a small server's memory."""
MAX_INPUT_PIXELS = 4_000_000
"""That the detector computes on, after the resizing of the config. COCO's has at most 1333x800."""
_MAX_RESIZED_PIXELS = 16_000_000
"""That the resizing of the config gets: it makes floating-point numbers of them."""

_SMALLEST_SHOWN, _LARGEST_SHOWN = 800, 1280  # pixels of the longer side as it is drawn
_LABEL_SIZE = 13.0  # points


class PictureRefused(UserError):
    """A picture that cannot be used; the message is for who uploaded it."""


@dataclass(frozen=True)
class ViewedPicture:
    """A picture and what the stages did with it; never changed, so that users may share one."""

    name: str
    image: np.ndarray
    """(H', W', 3) RGB at the size that it is drawn in."""
    traces: tuple[StageTrace, ...]
    """S, in pixels of the original picture."""
    seen_size: tuple[int, int] | None = None
    """(height, width) that the detector computed on, if that was less than the config says."""

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.traces)

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the picture as it came."""
        return self.traces[0].detections.image_size

    @cached_property
    def shown_traces(self) -> list[StageTrace]:
        """The traces in pixels of ``image``."""
        return [resize_trace(trace, *self.image.shape[:2]) for trace in self.traces]

    def detections(self, stage: int, threshold: float) -> Instances:
        """Those of a stage, counted from 0, with at least this score, best first."""
        return select_confident(self.traces[stage].detections, threshold)

    def query_at(self, x: float, y: float, *, stage: int, threshold: float) -> int | None:
        """The query of the smallest detection around a point of ``image``, if there is one."""
        found = select_confident(self.shown_traces[stage].detections, threshold)
        x0, y0, x1, y1 = found.pred_boxes.tensor.unbind(1)
        around = found[(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)]
        if not len(around):
            return None
        return int(around.query_index[around.pred_boxes.area().argmin()])


class StageViewer:
    """A detector for many users, one picture after the other."""

    def __init__(
        self,
        predictor: Predictor,
        *,
        max_pixels: int = MAX_PIXELS,
        max_input_pixels: int = MAX_INPUT_PIXELS,
    ):
        """
        Args:
            predictor: as ``build_inspected_detector`` makes it.
            max_pixels: larger pictures are refused before they are decoded.
            max_input_pixels: what the config makes larger is scaled down before detection.
        """
        self.predictor = predictor
        self.max_input_pixels = max_input_pixels
        self.max_pixels = max_pixels
        # The hooks that record the stages are on the one model.
        self._lock = threading.Lock()

    @property
    def metadata(self) -> Metadata:
        """Of the detector's test set: the class names."""
        return self.predictor.metadata

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.predictor.model.decoder.stages)

    def view_file(self, path: str | Path, name: str | None = None) -> ViewedPicture:
        """Read a file of any origin and run the detector on it.

        Args:
            path: of the file.
            name: under which its user knows it; default: its own.

        Raises:
            PictureRefused: it is no picture, damaged, too large, or too thin.
        """
        name = shown(Path(path).name if name is None else name)
        try:
            image = read_image(path, "BGR", max_pixels=self.max_pixels)
        except UnreadableImageError as error:
            raise PictureRefused(f"{name} {_reason(error, self.max_pixels)}") from error
        except MemoryError as error:
            raise PictureRefused(f"{name} is too large for this machine") from error
        return self.view(image, name)

    def view(self, image: np.ndarray, name: str) -> ViewedPicture:
        """Run the detector on an (H, W, 3) BGR picture.

        Raises:
            PictureRefused: it is too thin to be resized, or predictions are not finite.
        """
        height, width = image.shape[:2]
        try:
            image = _reduced(image, _MAX_RESIZED_PIXELS)
            inputs, seen_size = self._prepare(image)
            # Predictions are in pixels of the original, whatever was scaled on the way.
            inputs["height"], inputs["width"] = height, width
            with self._lock:
                traces = trace_stages(self.predictor.model, inputs)
        except UnreadableImageError as error:
            raise PictureRefused(
                f"{name} of {width}x{height} pixels is too thin for the detector"
            ) from error
        if not all(trace.boxes.isfinite().all() for trace in traces):
            raise PictureRefused(f"the detector's answer to {name} is not finite")
        return ViewedPicture(name, _shown(image), tuple(traces), seen_size)

    def _prepare(self, image: np.ndarray) -> tuple[dict[str, Any], tuple[int, int] | None]:
        """The detector's input, and its (height, width) if it was scaled to the limit."""
        inputs = self.predictor.preprocess(image)
        resized = inputs["image"].numpy().transpose(1, 2, 0)
        reduced = _reduced(resized, self.max_input_pixels)
        if reduced is resized:
            return inputs, None
        inputs["image"] = torch.from_numpy(np.ascontiguousarray(reduced.transpose(2, 0, 1)))
        return inputs, reduced.shape[:2]

    def draw(
        self, viewed: ViewedPicture, stage: int, threshold: float, query: int | None = None
    ) -> np.ndarray:
        """(H', W', 3) RGB: the detections of a stage, counted from 0; or a query's way to it."""
        if query is None:
            found = viewed.shown_traces[stage].detections
            return draw_detections(
                viewed.image,
                found,
                self.metadata,
                threshold=threshold,
                scale=1.0,
                font_size=_LABEL_SIZE,
            )
        return draw_followed_query(
            viewed.image,
            viewed.shown_traces,
            query,
            self.metadata,
            stage=stage,
            threshold=threshold,
        )

    def draw_stages_of(self, viewed: ViewedPicture, query: int) -> np.ndarray:
        """(H'', W'', 3) RGB: sampling points, way, boxes and scores of a query at all stages."""
        figure = draw_query_stages(
            viewed.image,
            viewed.shown_traces,
            query,
            self.metadata,
            strides=self.predictor.model.strides,
        )
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()

    def name_queries(
        self, viewed: ViewedPicture, threshold: float, followed: int | None = None
    ) -> list[tuple[str, int]]:
        """Queries to choose from, with what the last stage makes of them, best first.

        Args:
            viewed: the picture.
            threshold: least score of the last stage.
            followed: a query that stays in the list whatever its score.
        """
        last = viewed.traces[-1]
        best, labels = last.scores.max(dim=1)
        found = viewed.detections(-1, threshold).query_index.tolist()
        queries = list(dict.fromkeys(found))
        if followed is not None and followed not in queries:
            queries.append(followed)
        names = [self.class_name(int(labels[q])) for q in queries]
        return [(f"{q}: {name} {float(best[q]):.2f}", q) for q, name in zip(queries, names)]

    def class_name(self, label: int) -> str:
        """Of a class by its index; the index where there are no names."""
        names = self.metadata.get("thing_classes", None)
        return names[label] if names is not None and label < len(names) else str(label)


class Detection(NamedTuple):
    """A row of the table; box in pixels of the original picture."""

    label: str
    score: float
    x: float
    y: float
    width: float
    height: float
    query: int


def list_detections(viewer: StageViewer, found: Instances) -> list[Detection]:
    """The rows of the table for detections of :meth:`ViewedPicture.detections`, in their order."""
    rows = []
    for (x0, y0, x1, y1), score, label, query in zip(
        found.pred_boxes.tensor.tolist(),
        found.scores.tolist(),
        found.pred_classes.tolist(),
        found.query_index.tolist(),
    ):
        name = viewer.class_name(label)
        rows.append(Detection(name, score, x0, y0, x1 - x0, y1 - y0, query))
    return rows


def coco_results(viewer: StageViewer, found: Instances, name: str) -> list[dict[str, Any]]:
    """The same detections in COCO's format of results, boxes XYWH in original pixels.

    As in COCO, the number of an image is that in its file name; it is 1 where there is none.
    Categories have the ids of the data set that the detector's config names.
    """
    stem = Path(name).stem
    image_id = int(stem) if stem.isascii() and stem.isdigit() else 1
    results = instances_to_coco_json(found, image_id)
    ids = viewer.metadata.get("thing_dataset_id_to_contiguous_id", None)
    if ids is not None:
        original = {index: dataset_id for dataset_id, index in ids.items()}
        for result in results:
            label = result["category_id"]
            result["category_id"] = original.get(label, label)
    return results


class ExampleImages:
    """Pictures of the built-in data to begin with, drawn when they are asked for."""

    def __init__(self, spec: ShapesSpec, indices: Sequence[int] = (5, 2, 8, 4, 6, 3)):
        """
        Args:
            spec: of the data set.
            indices: of its images.
        """
        self._spec = spec
        self._indices = tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, number: int) -> str:
        """As the data set calls the file."""
        return f"{self._indices[number]:06d}.png"

    def image(self, number: int) -> np.ndarray:
        """(H, W, 3) BGR."""
        return render_image(self._spec, self._indices[number])[0]


def _reduced(image: np.ndarray, max_pixels: int) -> np.ndarray:
    """An (H, W, C) picture, in its form, of at most so many pixels."""
    height, width = image.shape[:2]
    if height * width <= max_pixels:
        return image
    scale = (max_pixels / (height * width)) ** 0.5
    shorter = max(1, int(min(height, width) * scale))
    longer = min(int(max(height, width) * scale), max_pixels // shorter)
    size = (shorter, longer) if width < height else (longer, shorter)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _shown(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = min(max(longer, _SMALLEST_SHOWN), _LARGEST_SHOWN) / longer
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return np.ascontiguousarray(cv2.resize(image, size, interpolation=method)[:, :, ::-1])


def _reason(error: UnreadableImageError, max_pixels: int) -> str:
    """Why a file is refused, without the server's paths."""
    cause = error.__cause__
    if isinstance(cause, UnidentifiedImageError):
        return "is not a picture that can be read. JPEG, PNG, WebP, BMP, GIF and TIFF can be"
    if isinstance(cause, Image.DecompressionBombError):
        return f"has too many pixels: at most {max_pixels / 1e6:g} million can be used"
    if isinstance(cause, ValueError):
        return f"cannot be used: {cause}"
    return "is damaged: it cannot be decoded"
