"""One figure a picture: what every stage of the decoder found, looked at and reused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import Metadata
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..errors import UserError
from .fonts import use_fonts
from .labels import BoxLabel, place_labels
from .paper import TEXT_WIDTH, draw_box, fix_layout, new_figure, prepare_picture
from .pictures import DEFAULT_SCORE_THRESHOLD, class_color, class_name
from .stage_traces import StageTrace
from .viewers import LABEL_SIZE, STAGE_VIEWERS

__all__ = [
    "choose_queries",
    "draw_followed_query",
    "draw_query_stages",
    "draw_stages",
    "level_colors",
    "stage_colors",
]

# Told apart by readers who cannot see red or green, too (Okabe and Ito).
_QUERY_COLORS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00")
_LEVELS = LinearSegmentedColormap.from_list("levels", ["#0b3c8c", "#1b9e9e", "#e08214", "#b2182b"])
# Of the groups of points, where a point's share in its group is shown.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_LEGEND = 0.26  # inches, of the markers' legend
_BOX = dict(boxstyle="square,pad=0.15", lw=0)


def choose_queries(traces: Sequence[StageTrace], count: int, *, threshold: float) -> list[int]:
    """The queries of the best detections of the last stage, each once, best first.

    Raises:
        ValueError: nothing reaches the threshold.
    """
    last = traces[-1].detections
    queries = list(dict.fromkeys(last.query_index[last.scores >= threshold].tolist()))
    if not queries:
        best = f"{float(last.scores.max()):.3f}" if len(last) else "none at all"
        raise UserError(
            f"no detection reaches the score {threshold:g} (the best one: {best}): lower "
            "--confidence-threshold"
        )
    return queries[:count]


def draw_stages(
    image: np.ndarray,
    traces: Sequence[StageTrace],
    metadata: Metadata | None = None,
    *,
    threshold: float = DEFAULT_SCORE_THRESHOLD,
    num_queries: int = 2,
    strides: Sequence[int] = (4, 8, 16, 32),
) -> Figure:
    """Detections, sampling points, trajectories and scores of all stages, and what methods add.

    The (up to six) best queries have one colour each in all panels, and labels; other detections
    are white.

    Args:
        image: (H, W, 3) RGB, the picture that the traces are of.
        traces: of the S stages, by :func:`~detection_toolkit.visualization.trace_stages`.
        metadata: its ``thing_classes`` name the classes.
        threshold: lowest score of a detection that is drawn.
        num_queries: of so many of the best queries, 1 to 6, the sampling points are drawn.
        strides: of the L feature levels, for the legend.

    Raises:
        ValueError: nothing reaches the threshold in the last stage, or too many queries.
    """
    if not 1 <= num_queries <= len(_QUERY_COLORS):
        raise UserError(f"1 to {len(_QUERY_COLORS)} queries can be drawn, not {num_queries}")
    colors = dict(
        zip(choose_queries(traces, len(_QUERY_COLORS), threshold=threshold), _QUERY_COLORS)
    )
    classes = {q: int(traces[-1].scores[q].argmax()) for q in colors}
    sampled = list(colors)[:num_queries] if traces[0].points is not None else []

    aspect = min(max(image.shape[0] / image.shape[1], 0.4), 1.5)
    row = 0.94 * TEXT_WIDTH / len(traces) * aspect + 0.17
    heights = [row + 0.08, *[0.97 * row] * len(sampled), 1.75]
    if sampled and traces[0].shares is not None:
        heights[-2] += _LEGEND
    figure = new_figure(sum(heights) + 0.05)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    labels = _detections_row(parts[0], image, traces, metadata, colors, threshold)
    for part, query in zip(parts[1:], sampled):
        _points_row(
            part,
            image,
            traces,
            query,
            color=colors[query],
            name=class_name(metadata, classes[query]),
            aspect=aspect,
            strides=strides,
            with_legend=query == sampled[-1],
        )
    best = next(iter(colors))
    viewers = {name: viewer() for name, viewer in STAGE_VIEWERS if name in traces[0].records}
    widths = [1, 1, 1.25, *(viewer.width for viewer in viewers.values())]
    axes = parts[-1].subplots(1, len(widths), width_ratios=widths)
    _trajectories(axes[0], image, traces, colors)
    _refinement(axes[1], image, traces, best, colors[best])
    labels += _scores(axes[2], traces, metadata, colors, classes)
    for axis, (name, viewer) in zip(axes[3:], viewers.items()):
        viewer.draw(axis, [trace.records[name] for trace in traces])
    _place_in_figure(figure, labels)
    return figure


def draw_query_stages(
    image: np.ndarray,
    traces: Sequence[StageTrace],
    query: int,
    metadata: Metadata | None = None,
    *,
    strides: Sequence[int] = (4, 8, 16, 32),
) -> Figure:
    """Sampling points of one query at every stage, its way, its boxes and its scores.

    Args:
        image, traces, metadata, strides: see :func:`draw_stages`.
        query: counted from 0.
    """
    color = _QUERY_COLORS[0]
    classes = {query: int(traces[-1].scores[query].argmax())}
    aspect = min(max(image.shape[0] / image.shape[1], 0.4), 1.5)
    heights = [1.75]
    if traces[0].points is not None:
        legend = 0.0 if traces[0].shares is None else _LEGEND
        heights.insert(0, 0.91 * TEXT_WIDTH / len(traces) * aspect + 0.17 + legend)
    figure = new_figure(sum(heights) + 0.05)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if traces[0].points is not None:
        _points_row(
            parts[0],
            image,
            traces,
            query,
            color=color,
            name=class_name(metadata, classes[query]),
            aspect=aspect,
            strides=strides,
            with_legend=True,
        )
    axes = parts[-1].subplots(1, 3, width_ratios=[1.2, 1, 1.6])
    _trajectories(axes[0], image, traces, {query: color})
    _refinement(axes[1], image, traces, query, color)
    _place_in_figure(figure, _scores(axes[2], traces, metadata, {query: color}, classes))
    return figure


def draw_followed_query(
    image: np.ndarray,
    traces: Sequence[StageTrace],
    query: int,
    metadata: Metadata | None = None,
    *,
    stage: int,
    threshold: float = DEFAULT_SCORE_THRESHOLD,
) -> np.ndarray:
    """One stage on the picture as a whole: a query's way up to it, over all detections.

    Args:
        image, traces, metadata, threshold: see :func:`draw_stages`; detections are those of the
            stage.
        query: counted from 0.
        stage: counted from 0. Boxes after it and the stages before have the colours of
            :func:`stage_colors`, the box that it starts from is dashed (a point is a cross), and
            its sampling points have the colours of :func:`level_colors`, mixed by their level
            weights. Where the points of a group are summed, as by the heads of an attention, each
            group has a marker of its own, whose area is the point's share in the sum.

    Returns:
        (H, W, 3) RGB uint8, of the size of ``image``.
    """
    height, width = image.shape[:2]
    dpi = 100
    # Half a pixel more than needed, which is cut off below: the canvas rounds down.
    figure = Figure(figsize=((width + 0.5) / dpi, (height + 0.5) / dpi), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    prepare_picture(axis, image, pale=True)
    axis.set_axis_off()
    unit = max(1.0, (height * width) ** 0.5 / 600)  # of line widths and type

    trace = traces[stage]
    found = trace.detections[trace.detections.scores >= threshold]
    for box, label, other in zip(
        found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), found.query_index.tolist()
    ):
        if other != query:
            draw_box(axis, box, class_color(metadata, label), width=1.1 * unit)
    if trace.points is not None:
        _scatter_points(axis, trace, query, size=16 * unit**2, width=0.5 * unit)
    _draw_start(axis, trace.boxes_before[query], width=1.3 * unit)
    shades = stage_colors(len(traces))
    for index in range(stage + 1):
        line = (1.3 if index < stage else 2.4) * unit
        draw_box(axis, traces[index].boxes[query], shades[index], width=line, outline="white")
    boxes = torch.stack([traces[0].boxes_before[query], *(t.boxes[query] for t in traces)])
    centers = ((boxes[:, :2] + boxes[:, 2:]) / 2)[: stage + 2]
    axis.plot(*centers.T, color="white", lw=2.6 * unit, zorder=4)
    axis.plot(*centers.T, color="black", lw=1.2 * unit, zorder=4)
    axis.scatter(
        *centers[1:].T, c=shades[: stage + 1], s=34 * unit**2, lw=unit, ec="white", zorder=5
    )
    label = int(trace.scores[query].argmax())
    text = f"query {query}: {class_name(metadata, label)} {float(trace.scores[query, label]):.2f}"
    style = {**_label_style(_QUERY_COLORS[0]), "zorder": 6}
    canvas.draw()  # the layout is final then
    place_labels(axis, [BoxLabel(trace.boxes[query].tolist(), text, style)], size=9.5 * unit)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:height, :width, :3].copy()


def level_colors(count: int) -> list:
    """RGBA colours of the feature levels, finest first."""
    return [_LEVELS(level / max(1, count - 1)) for level in range(count)]


def stage_colors(count: int) -> list:
    """RGBA colours of the stages."""
    return [colormaps["viridis"](0.95 - 0.9 * t / max(1, count - 1)) for t in range(count)]


def _detections_row(
    part, image, traces, metadata, colors, threshold
) -> list[tuple[Axes, BoxLabel]]:
    """Draw the boxes; returns the labels of the followed ones, the best ones last."""
    axes = part.subplots(1, len(traces), squeeze=False)[0]
    labels = []
    for number, (axis, trace) in enumerate(zip(axes, traces), start=1):
        found = trace.detections
        found = found[found.scores >= threshold]
        prepare_picture(axis, image, f"stage {number}: {_count(len(found), 'detection')}")
        # Followed queries on top of the others, the best one on top of all.
        order = sorted(
            range(len(found)),
            key=lambda i: (int(found.query_index[i]) in colors, float(found.scores[i])),
        )
        for i in order:
            color = colors.get(int(found.query_index[i]), "white")
            box = found.pred_boxes.tensor[i].tolist()
            draw_box(axis, box, color, width=1.1, outline="black")
            if color != "white":
                name = class_name(metadata, int(found.pred_classes[i]))
                label = f"{name} {found.scores[i]:.2f}"
                labels.append((axis, BoxLabel(box, label, _label_style(color))))
    axes[0].set_ylabel("detections", fontsize=7)
    return labels


def _place_in_figure(figure: Figure, labels: Sequence[tuple[Axes, BoxLabel]]) -> None:
    """Write labels into several axes, the last ones of each first; the layout is final then."""
    use_fonts(figure)
    fix_layout(figure)
    for axis in dict.fromkeys(axis for axis, _ in labels):
        here = [label for other, label in reversed(labels) if other is axis]
        legend = axis.get_legend()
        taken = [] if legend is None else [legend.get_window_extent()]
        place_labels(axis, here, size=LABEL_SIZE, taken=taken)


def _label_style(color) -> dict:
    return {"color": "black", "zorder": 3, "bbox": dict(_BOX, fc=color, alpha=0.85)}


def _points_row(part, image, traces, query, *, color, name, aspect, strides, with_legend) -> None:
    axes = part.subplots(1, len(traces), squeeze=False)[0]
    num_levels = traces[0].level_weights.shape[-1]
    norm = Normalize(0, num_levels - 1)
    for number, (axis, trace) in enumerate(zip(axes, traces), start=1):
        prepare_picture(axis, image, f"points of stage {number}", pale=True)
        before, after = trace.boxes_before[query], trace.boxes[query]
        _scatter_points(axis, trace, query, size=5, width=0.2)
        _draw_start(axis, before, width=0.9)
        draw_box(axis, after, color, width=1.3)
        x0, x1, y0, y1 = _view(torch.stack([before, after]), aspect, image.shape)
        axis.set_xlim(x0, x1)
        axis.set_ylim(y1, y0)
        axis.set_facecolor("white")
    axes[0].set_ylabel(f"query {query}\n{name}", fontsize=7, color="black")
    axes[0].yaxis.label.set_bbox(dict(_BOX, fc=color, alpha=0.85))
    bar = part.colorbar(ScalarMappable(norm, _LEVELS), ax=axes, fraction=0.02, pad=0.008, aspect=22)
    bar.set_ticks(range(num_levels), labels=[str(s) for s in strides[:num_levels]])
    bar.ax.tick_params(labelsize=LABEL_SIZE, length=2, pad=1)
    bar.set_label("weighted stride", fontsize=LABEL_SIZE)
    if with_legend and traces[0].shares is not None:
        numbers = range(int(traces[0].groups.max()) + 1)
        part.legend(
            [Line2D([], [], marker=_marker(i), color="0.3", ls="", ms=3) for i in numbers],
            [str(i + 1) for i in numbers],
            title="head (the area of a point is its share in the head's sum)",
            fontsize=LABEL_SIZE,
            title_fontsize=LABEL_SIZE,
            loc="outside lower center",
            ncols=len(numbers),
            frameon=False,
            handletextpad=0.0,
            columnspacing=0.8,
            borderpad=0.0,
            labelspacing=0.1,
        )


def _marker(group: int) -> str:
    return _MARKERS[group % len(_MARKERS)]


def _draw_start(axis, box: Tensor, *, width: float) -> None:
    """What a stage starts from: a dashed box, or a cross where it is a point."""
    if bool((box[2:] > box[:2]).any()):
        draw_box(axis, box, "black", width=width, ls=(0, (4, 2)))
    else:
        axis.plot(*box[:2], "+", color="black", ms=8 * width, mew=width, zorder=4)


def _scatter_points(axis, trace: StageTrace, query: int, *, size: float, width: float) -> None:
    weights = trace.level_weights[query]
    mean_level = (weights * torch.arange(weights.shape[-1], dtype=torch.float32)).sum(-1)
    style = dict(cmap=_LEVELS, norm=Normalize(0, weights.shape[-1] - 1), lw=width, ec="white")
    points = trace.points[query]
    if trace.shares is None:
        axis.scatter(*points.T, c=mean_level, s=size, zorder=3, **style)
        return
    shares = trace.shares[query]
    areas = 1.6 * size * shares / shares.mean()
    for group in range(int(trace.groups.max()) + 1):
        own = trace.groups == group
        axis.scatter(
            *points[own].T,
            c=mean_level[own],
            s=areas[own],
            marker=_marker(group),
            zorder=3,
            **style,
        )


def _view(
    boxes: Tensor, aspect: float, shape, *, margin: float = 1.6
) -> tuple[float, float, float, float]:
    """Limits (x0, x1, y0, y1) around boxes, of the given aspect ratio (height over width)."""
    height, width = shape[:2]
    x0, y0 = boxes[:, :2].amin(0).tolist()
    x1, y1 = boxes[:, 2:].amax(0).tolist()
    w = margin * max(x1 - x0, (y1 - y0) / aspect, width / 12)
    if w >= width * 1.1:
        w = width * 1.1  # the picture as a whole, with the points just outside of it
        x, y = width / 2, height / 2
    else:
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - w / 2, x + w / 2, y - w * aspect / 2, y + w * aspect / 2


def _trajectories(axis, image, traces, colors) -> None:
    prepare_picture(axis, image, pale=True)
    axis.set_title("box of each query, by stage", fontsize=7, pad=2.5)
    for query, color in reversed(colors.items()):
        for number, trace in enumerate(traces, start=1):
            share = number / len(traces)
            draw_box(axis, trace.boxes[query], color, width=0.3 + 1.2 * share, alpha=share)
        boxes = torch.stack([traces[0].boxes_before[query], *(t.boxes[query] for t in traces)])
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        axis.plot(*centers.T, color="black", lw=1.3, zorder=3)
        axis.plot(*centers.T, color=color, lw=0.8, zorder=3)
        axis.scatter(*centers[1:].T, color=color, s=7, zorder=4, lw=0.4, ec="black")
        axis.scatter(*centers[0], color="black", marker="s", s=9, zorder=5)
    first = torch.stack([traces[0].boxes_before[query] for query in colors])
    height, width = image.shape[:2]
    whole = torch.tensor([0.0, 0.0, width, height])
    start = "start: the whole picture" if (first - whole).abs().max() < 1 else "start"
    axis.set_xlabel(f"■ {start}\n● centre after each stage", fontsize=LABEL_SIZE)


def _refinement(axis, image, traces, query, color) -> None:
    prepare_picture(axis, image, pale=True)
    axis.set_title(f"boxes of query {query}", fontsize=7, pad=2.5).set_bbox(
        dict(_BOX, fc=color, alpha=0.85)
    )
    boxes = torch.stack([trace.boxes[query] for trace in traces])
    shades = stage_colors(len(traces))
    for index, (box, shade) in enumerate(zip(boxes, shades)):
        draw_box(axis, box, shade, width=0.8 + 0.9 * index / len(traces))
    # In a square of its own, whatever the picture's sides.
    x0, x1, y0, y1 = _view(boxes, 1.0, image.shape, margin=1.25)
    axis.set_xlim(x0, x1)
    axis.set_ylim(y1, y0)
    axis.legend(
        [Line2D([], [], color=shade, lw=1.6) for shade in shades],
        [str(t) for t in range(1, len(traces) + 1)],
        title="after stage",
        fontsize=LABEL_SIZE,
        title_fontsize=LABEL_SIZE,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=len(traces),
        frameon=False,
        handlelength=0.8,
        columnspacing=0.7,
        handletextpad=0.3,
        borderpad=0.1,
    )


def _scores(axis, traces, metadata, colors, classes) -> list[tuple[Axes, BoxLabel]]:
    """Draw the scores; returns the names of other classes that lead somewhere."""
    labels = []
    stages = range(1, len(traces) + 1)
    for query, color in colors.items():
        scores = [float(t.scores[query, classes[query]]) for t in traces]
        name = class_name(metadata, classes[query])
        axis.plot(stages, scores, "o-", color=color, ms=3.2, lw=1.4, label=f"{query}: {name}")
        # Where another class leads, it is named.
        for stage, trace in zip(stages, traces):
            leading = int(trace.scores[query].argmax())
            if leading != classes[query]:
                value = float(trace.scores[query, leading])
                axis.plot(stage, value, "x", color=color, ms=4)
                name = class_name(metadata, leading)
                labels.append((axis, BoxLabel((stage, value, stage, value), name)))
    axis.set_title("score by stage (× another class leads)", fontsize=7, pad=2.5)
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("stage", fontsize=LABEL_SIZE + 0.6, labelpad=1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=LABEL_SIZE, length=2, pad=1.5)
    axis.grid(alpha=0.3, lw=0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        fontsize=LABEL_SIZE,
        loc="best",
        ncols=1 + (len(colors) > 3),
        framealpha=0.6,
        edgecolor="none",
        title="query",
        title_fontsize=LABEL_SIZE,
        borderpad=0.1,
        labelspacing=0.2,
    )
    return labels


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
