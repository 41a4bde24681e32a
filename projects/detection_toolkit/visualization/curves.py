"""Loss and AP curves of a training, from the metrics.json that Detectron2's JSONWriter leaves."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..durable import write_durably
from ..errors import UserError
from ..texts import parse_json
from .fonts import drawable

__all__ = ["fit_percent_axis", "plot_ap_curves", "plot_loss_curves", "read_metrics"]

logger = logging.getLogger(__name__)

# The names under which the trainer reports the sums over the stages, and each stage's own.
_LOSS = re.compile(r"^loss_(?P<kind>\w+)$")
_STAGE_LOSS = re.compile(r"^stage(?P<stage>\d+)/(?P<kind>\w+)$")
_KIND_NAMES = {"cls": "classification", "bbox": "L1 of boxes", "giou": "GIoU"}


def read_metrics(metrics_file: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Series of a Detectron2 metrics file.

    Args:
        metrics_file: ``metrics.json``, one JSON object a line, each with "iteration".

    Returns:
        {name: (iterations (T,) int, values (T,) float)}, by growing iteration. Where a resumed
        training wrote an iteration again, its value counts. Values that are not finite are kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not JSON (the last one may be cut short, as after a crash).
    """
    path = Path(metrics_file)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics file {path}: training writes it to train.output_dir")
    series: dict[str, dict[int, float]] = defaultdict(dict)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            iteration = record.get("iteration")
            if iteration is None:
                continue
            iteration = int(iteration)
            values = {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            if number == len(lines):
                logger.warning("%s: line %d is incomplete, left out", path, number)
                continue
            raise UserError(f"{path}: line {number} is not JSON of metrics: {error}") from error
        for key, value in values.items():
            if key != "iteration":
                series[key][iteration] = value
    return {
        key: (np.array(sorted(found)), np.array([found[i] for i in sorted(found)]))
        for key, found in series.items()
    }


def plot_loss_curves(metrics_file: str | Path, output: str | Path) -> str:
    """Draw the losses of a run: the total, each kind, each stage, and the learning rate.

    Those on the test set, where there are any, stand beside the total and those of the stages.

    Args:
        metrics_file: see :func:`read_metrics`.
        output: PNG to write; its folder is created.

    Returns:
        the path written.

    Raises:
        FileNotFoundError: no such metrics file.
        ValueError: it holds no loss.
    """
    series = read_metrics(metrics_file)
    if "total_loss" not in series:
        raise UserError(f"{metrics_file} holds no total_loss: nothing was trained long enough")
    by_kind = {m["kind"]: series[m.string] for m in map(_LOSS.match, series) if m}
    by_stage: dict[int, list] = defaultdict(list)
    for match in filter(None, map(_STAGE_LOSS.match, series)):
        if match["kind"] in by_kind:  # and not an accuracy
            by_stage[int(match["stage"])].append(series[match.string])

    figure, axes = _figure(1 + bool(by_kind) + bool(by_stage))
    _draw(axes[0], *series["total_loss"], label="total loss", color="tab:blue")
    if "validation/total" in series:
        style = {"marker": "o", "markersize": 4, "color": "tab:orange"}
        axes[0].plot(*series["validation/total"], label="on the test set", **style)
    axes[0].set_title("Total loss")
    if "lr" in series:
        rate = axes[0].twinx()
        rate.plot(*series["lr"], color="tab:gray", linestyle=":", linewidth=1.2)
        rate.set_ylabel("learning rate (dotted)", color="tab:gray")
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if by_kind:
        axes[1].set_title("By kind, summed over the stages")
    for index, kind in enumerate(sorted(by_kind)):
        _draw(
            axes[1],
            *by_kind[kind],
            label=_KIND_NAMES.get(kind) or drawable(kind),
            color=f"C{index}",
        )
    if by_stage:
        points = "; points: on the test set" if "validation/total" in series else ""
        axes[-1].set_title(f"By stage, summed over the kinds{points}")
    for stage in sorted(by_stage):
        # Viridis from dark to light: the order of the stages is visible without the legend.
        position = stage / max(1, max(by_stage)) * 0.85
        color = colormaps["viridis"](position)
        _draw(axes[-1], *_sum(by_stage[stage]), label=f"stage {stage + 1}", color=color)
        prefix = f"validation/stage{stage}/"
        on_test_set = [series[name] for name in series if name.startswith(prefix)]
        if on_test_set:
            axes[-1].plot(*_sum(on_test_set), marker="o", markersize=4, color=color)
    for axis in axes:
        axis.set_ylabel("loss")
        axis.set_ylim(bottom=0)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    return _save(figure, output)


def plot_ap_curves(
    metrics_file: str | Path,
    output: str | Path,
    start: Mapping[str, float] | None = None,
    *,
    prefix: str = "bbox/",
    names: Sequence[str] = ("AP", "AP50", "AP75"),
    title: str = "Average precision",
) -> str:
    """Draw how the average precision of a training grew, in percent.

    Args:
        metrics_file: see :func:`read_metrics`.
        output: PNG to write; its folder is created.
        start: values before the first step, {"AP": 31.2, ...}; drawn at iteration 0.
        prefix: what stands before the names in the file; with several test sets ``"name/bbox/"``.
        names: the metrics to draw.
        title: of the picture.

    Returns:
        the path written.

    Raises:
        FileNotFoundError: no such metrics file.
        ValueError: it holds none of these metrics, and there is no ``start``.
    """
    series = read_metrics(metrics_file)
    start = start or {}
    figure, (axis,) = _figure(1)
    drawn = False
    for index, name in enumerate(names):
        iterations, values = series.get(prefix + name, (np.zeros(0, int), np.zeros(0)))
        if name in start:
            iterations = np.concatenate([[0], iterations])
            values = np.concatenate([[start[name]], values])
        keep = np.isfinite(values)
        iterations, values = iterations[keep], values[keep]
        if not len(values):
            continue
        drawn = True
        label = f"{drawable(name)}: {values[-1]:.1f} at the end"
        axis.plot(iterations, values, marker="o", markersize=4, color=f"C{index}", label=label)
    if not drawn:
        raise UserError(
            f"{metrics_file} holds none of {', '.join(prefix + n for n in names)}: "
            "set train.eval_period to evaluate while training"
        )
    axis.set_title(drawable(title))
    axis.set_ylabel("AP (%)")
    fit_percent_axis(axis)
    axis.legend(frameon=False, loc="best")
    return _save(figure, output)


def fit_percent_axis(axis: Axes) -> None:
    """Limits of the y axis around what is drawn, at most 0 to 100, and not below 5 points apart."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    values = np.concatenate([v[np.isfinite(v)] for v in drawn]) if drawn else np.zeros(0)
    if not len(values):
        axis.set_ylim(0, 100)
        return
    middle, half = (values.min() + values.max()) / 2, max(2.5, 0.56 * np.ptp(values))
    low, high = max(0.0, middle - half), min(100.0, middle + half)
    # Whole steps: those of an axis from 61.3 to 88.7 are hard to read.
    step = 5 if high - low > 10 else 1
    axis.set_ylim(max(0, step * np.floor(low / step)), min(100, step * np.ceil(high / step)))


def _figure(panels: int):
    # A Figure of its own rather than pyplot's: no global state, no display.
    figure = Figure(figsize=(5.2 * panels + 1.0, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xlabel("iteration")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.spines[["top"]].set_visible(False)
    return figure, axes


def _draw(axis, iterations: np.ndarray, values: np.ndarray, *, label: str, color) -> None:
    """The values faintly, and their running median over a twentieth of the series boldly."""
    finite = np.isfinite(values)
    iterations, values = iterations[finite], values[finite]
    window = max(1, len(values) // 20)
    smooth = [np.median(values[max(0, i - window) : i + window + 1]) for i in range(len(values))]
    axis.plot(iterations, values, color=color, alpha=0.25, linewidth=1)
    marker = "o" if len(values) == 1 else None
    axis.plot(iterations, smooth, color=color, linewidth=1.8, label=label, marker=marker)


def _sum(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum series at the iterations that they share."""
    shared = sorted(set.intersection(*(set(iterations.tolist()) for iterations, _ in parts)))
    total = np.zeros(len(shared))
    for iterations, values in parts:
        total += values[np.isin(iterations, shared)]
    return np.array(shared, dtype=int), total


def _save(figure: Figure, output: str | Path) -> str:
    path = Path(output)
    kind = path.suffix[1:] or "png"
    write_durably(path, lambda file: figure.savefig(file, format=kind))
    return str(path)
