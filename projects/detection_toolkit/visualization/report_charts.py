"""The charts of a report, and the page that holds them: one HTML file without any other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .curves import fit_percent_axis, plot_ap_curves, plot_loss_curves
from .fonts import drawable, use_fonts

__all__ = [
    "LABEL_ASSIGNERS",
    "Part",
    "chart_calibration",
    "chart_classes",
    "chart_confusion",
    "chart_differences",
    "chart_error_gains",
    "chart_label_changes",
    "chart_precision_recall",
    "chart_resamples",
    "chart_score_changes",
    "chart_stages",
    "chart_thresholds",
    "embed_picture",
    "format_facts",
    "format_table",
    "render_page",
    "training_charts",
]

Part = tuple[str, Any]
"""Of a page: its kind and its content; see :func:`render_page`."""

LABEL_ASSIGNERS = {"own_match": "each stage's own match", "cross_stage": "cross-stage matcher"}
"""Names of label assigners, as a reader knows them."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em;margin-bottom:.4em}h2{margin-top:2em;border-bottom:1px solid #ccc}
h3{font-size:1.05em;margin:.6em 0 .2em}figure{margin:.6em 0}img{max-width:100%}
.note{color:#555;font-size:.9em}.words{font-size:1.05em;max-width:62em}
table{border-collapse:collapse;margin:1em 0;width:100%;font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid #ddd;padding:.25em .6em;text-align:right}
td:first-child,th:first-child{text-align:left}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15em 1.2em;margin:.6em 0}
dt{color:#555}dd{margin:0;overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;gap:0 2em;align-items:flex-start}
.row>div{flex:1 1 26em;min-width:0}
.row img{width:100%}
@media(max-width:600px){td,th{padding:.25em .2em;font-size:.9em}}
"""


def training_charts(metrics_file: Path, prefix: str) -> dict[str, str]:
    """Loss and AP curves of a metrics.json as images to embed; those that it has numbers for.

    Args:
        metrics_file: see :func:`~detection_toolkit.visualization.read_metrics`.
        prefix: of the data set's metrics there.

    Returns:
        "loss" and "AP", or what there is of them.
    """
    charts = {}
    with TemporaryDirectory() as folder:
        target = Path(folder, "curves.svg")
        for name, draw in (
            ("loss", plot_loss_curves),
            ("AP", lambda m, o: plot_ap_curves(m, o, prefix=prefix)),
        ):
            try:
                draw(metrics_file, target)
            except ValueError:  # nothing of the kind was logged
                continue
            charts[name] = _embed(target.read_bytes(), "svg+xml")
    return charts


def chart_stages(stages: Sequence[Mapping[str, Any]], after_nms: Mapping[str, Any]) -> str:
    """AP, AP50, AP75 and AP by size after each stage."""
    figure, axis = _figure(6.4, 3.6)
    numbers = [s["stage"] for s in stages]
    for index, name in enumerate(("AP", "AP50", "AP75", "APs", "APm", "APl")):
        values = [np.nan if s[name] is None else s[name] for s in stages]
        if np.isfinite(values).any():
            style = "o-" if index < 3 else "o:"
            label = f"{name} {values[-1]:.1f}"
            axis.plot(numbers, values, style, ms=4, lw=1.6, label=label)
    if after_nms.get("AP") is not None:
        label = f"AP {after_nms['AP']:.1f} after NMS"
        axis.plot(numbers[-1:], [after_nms["AP"]], "kx", label=label)
    axis.set(xlabel="after stage", ylabel="AP (%)")
    fit_percent_axis(axis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, title="last stage", fontsize=9)
    return _svg(figure)


def chart_classes(names: Sequence[str], values: Sequence[float | None], limit: int = 40) -> str:
    """AP of each class, worst first; of many classes the worst and best ones."""
    pairs = sorted((v, n) for n, v in zip(names, values) if v is not None)
    if len(pairs) > limit:
        pairs = pairs[: limit // 2] + pairs[-limit // 2 :]
    figure, axis = _figure(5.6, max(2.6, 0.8 + 0.24 * len(pairs)))
    axis.barh(range(len(pairs)), [v for v, _ in pairs], color="tab:blue")
    axis.set_yticks(range(len(pairs)), [drawable(n) for _, n in pairs])
    for y, (value, _) in enumerate(pairs):
        axis.text(value, y, f" {value:.1f}", va="center", fontsize=8)
    axis.set(xlabel="AP (%)", xlim=(0, 108))
    axis.grid(axis="y", alpha=0)
    return _svg(figure)


def chart_precision_recall(recall: np.ndarray, curves: Mapping[str, np.ndarray]) -> str:
    """Precision over recall, mean over classes; {label: (101,)}."""
    figure, axis = _figure(5.6, 3.8)
    for label, precision in curves.items():
        axis.plot(recall, precision, label=label, lw=1.6)
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=9)
    return _svg(figure)


def chart_thresholds(
    curve: Mapping[str, Sequence[float | None]], best: Mapping[str, float] | None
) -> str:
    """Precision, recall and F1 of all classes together over the score threshold.

    Args:
        curve: "threshold", "precision", "recall", "f1".
        best: "score" and "f1" where F1 is highest; None where there is none.
    """
    figure, axis = _figure(5.6, 3.8)
    for name, color in (("precision", "tab:green"), ("recall", "tab:orange"), ("f1", "tab:blue")):
        values = [np.nan if v is None else v for v in curve[name]]
        label = "F1" if name == "f1" else name
        axis.plot(curve["threshold"], values, color=color, lw=1.6, label=label)
    if best is not None:
        label = f"best: {best['score']:.2f}, F1 {best['f1']:.2f}"
        axis.axvline(best["score"], color="0.35", lw=1, ls="--", label=label)
    axis.set(xlabel="score threshold", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    return _svg(figure)


def chart_confusion(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Rows: true class and background; columns: detected class and missed; shares of the rows."""
    size = len(matrix)
    inches = min(12.0, 2.6 + 0.42 * size)
    figure, axis = _figure(inches + 0.8, inches * 0.85)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    shown = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axis, fraction=0.04, label="share of the row")
    if size <= 25:
        for (y, x), value in np.ndenumerate(matrix):
            if value:
                color = "white" if share[y, x] > 0.6 else "black"
                axis.text(x, y, value, ha="center", va="center", fontsize=7.5, color=color)
    small = 8.5 if size <= 25 else 5
    names = [drawable(name) for name in names]
    axis.set_xticks(range(size), [*names, "not detected"], rotation=60, ha="right", fontsize=small)
    axis.set_yticks(range(size), [*names, "nothing there"], fontsize=small)
    axis.set(xlabel="detected as", ylabel="object")
    axis.grid(False)
    return _svg(figure)


def chart_error_gains(gains: Mapping[str, float], counts: Mapping[str, int]) -> str:
    """What fixing each kind of error would bring, and the share of each kind."""
    figure = Figure(figsize=(11, 3.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(gains)
    total = max(1, sum(counts.values()))
    for axis, values, title in (
        (left, [gains[n] for n in names], "AP50 gained if fixed (points)"),
        (right, [100 * counts[n] / total for n in names], "share of all errors (%)"),
    ):
        axis.barh(names, values, color=[f"C{i}" for i in range(len(names))])
        for y, value in enumerate(values):
            axis.text(value, y, f" {value:.1f}", va="center", fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        axis.set_xlim(0, max(1e-3, *values) * 1.18)
        axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def chart_score_changes(changes: Sequence[Mapping[str, Any]]) -> str:
    """Fading true and growing false positives, from each stage to the last one."""
    figure, axis = _figure(6.4, 3.4)
    for entry in changes:
        threshold = entry["iou_threshold"]
        style = "o-" if threshold == changes[0]["iou_threshold"] else "o:"
        for key, color, words in (
            ("faded", "tab:red", "true positives that fade"),
            ("grown", "tab:purple", "false positives that grow"),
        ):
            values = [np.nan if v is None else 100 * v for v in entry[f"{key}_from_stage"]]
            whole = "-" if entry[key] is None else f"{100 * entry[key]:.1f} % from any"
            label = f"{words}, IoU {threshold:g} ({whole})"
            axis.plot(range(1, len(values) + 1), values, style, color=color, ms=4, label=label)
    axis.set(xlabel="from stage", ylabel="share (%)", ylim=(0, 100))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=8.5)
    return _svg(figure)


def chart_label_changes(changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Queries whose class target changes from a stage to the next, with both label assigners."""
    figure, axis = _figure(6.4, 3.4)
    for index, (name, entry) in enumerate(changes.items()):
        values = [np.nan if v is None else 100 * v for v in entry["share_of_labelled_by_step"]]
        steps = np.arange(1, len(values) + 1)
        axis.bar(steps + 0.36 * (index - 0.5), values, 0.34, label=LABEL_ASSIGNERS.get(name, name))
        axis.set_xticks(steps, [f"{t} → {t + 1}" for t in steps])
    axis.set(xlabel="from stage to stage", ylabel="changed labels (%)")
    axis.legend(frameon=False, fontsize=9)
    return _svg(figure)


def chart_calibration(bins: Sequence[Mapping[str, float]]) -> str:
    """Share of true positives over the score, for each tenth of the score."""
    figure, axis = _figure(5.6, 3.8)
    axis.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", label="calibrated")
    scores, shares = [b["score"] for b in bins], [b["share"] for b in bins]
    sizes = [12 + 18 * np.log10(b["number"]) for b in bins]
    axis.plot(scores, shares, color="tab:blue", lw=1.4)
    axis.scatter(scores, shares, s=sizes, color="tab:blue", label="detections (size: number)")
    axis.set(xlabel="score", ylabel="share of true positives", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    return _svg(figure)


def chart_resamples(differences: Sequence[float], interval: Sequence[float]) -> str:
    """How often each difference of AP came out among the resamples."""
    figure, axis = _figure(5.6, 3.4)
    low, high = min(differences), max(differences)
    if high - low < 1e-6:  # one value, or one and its rounding: no width for bins
        low, high = low - 0.5, high + 0.5
    axis.hist(differences, bins=40, range=(low, high), color="tab:blue", alpha=0.75)
    axis.axvline(0, color="0.2", lw=1.2)
    for end in interval:
        axis.axvline(end, color="tab:red", lw=1.2, ls="--")
    axis.set(xlabel="AP of B - AP of A, in points", ylabel="resamples")
    return _svg(figure)


def chart_differences(
    rows: Sequence[tuple[str, float, Sequence[float] | None]], limit: int = 40
) -> str:
    """Differences with their intervals, in the order given; of many the first and last ones.

    Args:
        rows: (name, B - A, interval).
        limit: of rows.
    """
    if len(rows) > limit:
        rows = [*rows[: limit // 2], *rows[-limit // 2 :]]
    figure, axis = _figure(5.6, max(1.6, 0.9 + 0.26 * len(rows)))
    axis.axvline(0, color="0.2", lw=1.2)
    for y, (_, value, interval) in enumerate(rows):
        color = "tab:blue" if interval is None or interval[0] <= 0 <= interval[1] else "tab:red"
        if interval is not None:
            axis.plot(interval, (y, y), color=color, lw=2, alpha=0.6, solid_capstyle="butt")
        axis.plot([value], [y], "o", ms=5, color=color)
    axis.set_yticks(range(len(rows)), [drawable(name) for name, _, _ in rows])
    axis.set(xlabel="AP of B - AP of A, in points", ylim=(len(rows) - 0.4, -0.6))
    return _svg(figure)


def embed_picture(picture: np.ndarray, *, most_bytes: int | None = None) -> str:
    """An (H, W, 3) RGB picture as a JPEG in an address.

    Args:
        most_bytes: of the JPEG; a picture of more is made smaller, down to a few pixels.
    """
    image = Image.fromarray(picture)
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=82)
        if most_bytes is None or buffer.tell() <= most_bytes or max(image.size) <= 16:
            return _embed(buffer.getvalue(), "jpeg")
        # Its size goes with its area, about.
        scale = min(0.9, (most_bytes / buffer.tell()) ** 0.5)
        size = [max(1, int(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in HTML; numbers with one decimal, None as a dash."""

    def text(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{text(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def format_facts(facts: Mapping[str, str]) -> str:
    """Names and what they stand for, in HTML."""
    items = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def render_page(
    title: str, sections: Sequence[tuple[str, Sequence[Part]]], *, introduction: str = ""
) -> str:
    """The page.

    Args:
        title: of the page.
        sections: (heading, parts), each part (kind, content): "html" as it is; "text", "words" and
            "heading" escaped; "image" an address as the functions above return it; "row" a list of
            lists of parts, which stand side by side where there is room.
        introduction: a paragraph below the title; escaped.
    """
    out = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    if introduction:
        out.append(_render(("text", introduction), title))
    for heading, parts in sections:
        out.append(f"<h2>{html.escape(heading)}</h2>")
        out += [_render(part, heading) for part in parts]
    out.append("</body></html>")
    return "\n".join(out)


def _render(part: Part, title: str) -> str:
    kind, content = part
    if kind == "image":
        return f"<figure><img alt='{html.escape(title)}' src='{content}'></figure>"
    if kind == "heading":
        return f"<h3>{html.escape(content)}</h3>"
    if kind in ("text", "words"):
        return f"<p class='{'note' if kind == 'text' else kind}'>{html.escape(content)}</p>"
    if kind == "row":
        cells = ("\n".join(_render(inner, title) for inner in cell) for cell in content)
        return f"<div class='row'>{''.join(f'<div>{cell}</div>' for cell in cells)}</div>"
    return content


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _svg(figure: Figure) -> str:
    use_fonts(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _embed(buffer.getvalue(), "svg+xml")


def _embed(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
