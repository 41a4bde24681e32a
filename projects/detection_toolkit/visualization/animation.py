"""Boxes that move from stage to stage, as a short animation."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data import Metadata
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..durable import write_durably
from .labels import BoxLabel, place_labels
from .paper import draw_box
from .pictures import DEFAULT_SCORE_THRESHOLD, class_color, class_name
from .stage_traces import StageTrace, resize_trace
from .stages import choose_queries

__all__ = ["AnimationFrame", "animate_stages", "save_animation"]

_SHORTEST, _LONGEST = 480, 800  # pixels of the longer side
_STRIP = 34  # pixels below the picture, which say where we are
_DPI = 100
_MOVE, _MOVES, _HOLD = 40, 9, 1100  # milliseconds of a frame, frames between stages, pause


class AnimationFrame(NamedTuple):
    """A picture and how long it is shown."""

    picture: np.ndarray
    """(H, W, 3) RGB uint8."""
    milliseconds: int


def animate_stages(
    image: np.ndarray,
    traces: Sequence[StageTrace],
    metadata: Metadata | None = None,
    *,
    threshold: float = DEFAULT_SCORE_THRESHOLD,
    num_queries: int = 20,
) -> list[AnimationFrame]:
    """The boxes of the best queries, from where they begin through all stages.

    At each stage a box has the colour of the class that scores highest there, and a label with
    class and score, where there is room. Between stages it moves.

    Args:
        image: (H, W, 3) RGB, the picture that the traces are of.
        traces: of the S stages, by :func:`~detection_toolkit.visualization.trace_stages`.
        metadata: its ``thing_classes`` name the classes.
        threshold: least score, after the last stage, of a query that is shown.
        num_queries: at most so many.

    Raises:
        UserError: nothing reaches the threshold in the last stage.
    """
    queries = choose_queries(traces, num_queries, threshold=threshold)[::-1]  # the best on top
    longer = max(image.shape[:2])
    scale = min(max(longer, _SHORTEST), _LONGEST) / longer
    width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
    method = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    shown = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method)
    traces = [resize_trace(trace, height, width) for trace in traces]

    frames = []
    place = [traces[0].boxes_before, *(trace.boxes for trace in traces)]
    frames.append(AnimationFrame(_draw(shown, place[0], queries, traces, None, metadata), _HOLD))
    for t, (before, after) in enumerate(zip(place, place[1:])):
        for step in range(1, _MOVES):
            share = step / _MOVES
            share = share * share * (3 - 2 * share)  # slow at both ends
            boxes = before + share * (after - before)
            picture = _draw(shown, boxes, queries, traces, t, metadata, labelled=False)
            frames.append(AnimationFrame(picture, _MOVE))
        picture = _draw(shown, after, queries, traces, t, metadata)
        frames.append(AnimationFrame(picture, _HOLD * (1 + (t + 1 == len(traces)))))
    return frames


def save_animation(frames: Sequence[AnimationFrame], path: str | Path) -> str:
    """Write an endless animation as WebP, or as GIF by its suffix; as a whole or not at all.

    Returns:
        the path.
    """
    path = Path(path)
    first, *others = (Image.fromarray(frame.picture) for frame in frames)
    buffer = io.BytesIO()
    first.save(
        buffer,
        format="GIF" if path.suffix.lower() == ".gif" else "WEBP",
        save_all=True,
        append_images=others,
        duration=[frame.milliseconds for frame in frames],
        loop=0,
        quality=85,
        method=4,
    )
    write_durably(path, lambda file: file.write(buffer.getvalue()))
    return str(path)


def _draw(
    image: np.ndarray,
    boxes: Tensor,
    queries: Sequence[int],
    traces: Sequence[StageTrace],
    stage: int | None,
    metadata: Metadata | None,
    *,
    labelled: bool = True,
) -> np.ndarray:
    """The picture with the boxes (N, 4) of some queries; stage None: before the first one."""
    height, width = image.shape[:2]
    figure = Figure(figsize=((width + 0.5) / _DPI, (height + _STRIP + 0.5) / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    share = height / (height + _STRIP)
    axis = figure.add_axes((0, 1 - share, 1, share))
    axis.set_axis_off()
    axis.imshow(image, aspect="auto")
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    labels = []
    for query in queries:
        box = boxes[query].tolist()
        if stage is None:
            draw_box(axis, box, "white", width=1.8, outline="black")
            continue
        scores = traces[stage].scores[query]
        label = int(scores.argmax())
        color = class_color(metadata, label)
        draw_box(axis, box, color, width=2.2, outline="white")
        style = {"color": "white", "bbox": dict(fc=(0, 0, 0, 0.75), ec="none", pad=1.5)}
        text = f"{class_name(metadata, label)} {float(scores[label]):.2f}"
        labels.append(BoxLabel(box, text, style))
    if labelled:
        place_labels(axis, labels[::-1], size=9)
    _draw_strip(figure.add_axes((0, 0, 1, 1 - share)), len(traces), stage)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[: height + _STRIP, :width, :3].copy()


def _draw_strip(axis, num_stages: int, stage: int | None) -> None:
    """Start and stages as dots on a line, and the present one filled."""
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_axis_off()
    places = np.linspace(0.08, 0.92, num_stages + 1)
    axis.plot(places[[0, -1]], [0.68, 0.68], color="0.75", lw=1.5, zorder=1)
    now = 0 if stage is None else stage + 1
    for i, x in enumerate(places):
        color = "#0072B2" if i <= now else "white"
        axis.scatter([x], [0.68], s=34, color=color, ec="#0072B2", lw=1.2, zorder=2)
        text = "start" if i == 0 else f"stage {i}"
        weight = "bold" if i == now else "normal"
        axis.text(x, 0.06, text, ha="center", va="bottom", fontsize=8, weight=weight)
