"""Figures for print: the width of a text column, small type, PNG and PDF."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..durable import write_durably
from .pictures import distinct_names

__all__ = [
    "TEXT_WIDTH",
    "draw_box",
    "figure_stems",
    "fix_layout",
    "new_figure",
    "prepare_picture",
    "save_figure",
]

TEXT_WIDTH = 7.2
"""Inches: the text of a page with two columns, or a slide's half."""

_SMALL = 6.5  # points
_DPI = 220


def new_figure(height: float) -> Figure:
    """A figure as wide as a page's text, in inches; no global state, no display."""
    figure = Figure(figsize=(TEXT_WIDTH, height), dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.03)
    FigureCanvasAgg(figure)
    return figure


def fix_layout(figure: Figure) -> None:
    """Find the layout and keep it, for what is then placed where there is room."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def prepare_picture(axis, image: np.ndarray, title: str = "", *, pale: bool = False) -> None:
    """Show an (H, W, 3) RGB picture without ticks; if pale, marks on it stand out."""
    if pale:
        image = (255 - 0.38 * (255 - image.astype(np.float32))).astype(np.uint8)
    axis.imshow(image, interpolation="lanczos")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_linewidth(0.4)
    axis.set_xlim(0, image.shape[1])
    axis.set_ylim(image.shape[0], 0)
    if title:
        axis.set_title(title, fontsize=_SMALL + 0.5, pad=2.5)


def draw_box(
    axis, box: Sequence[float], color, *, width: float = 1.2, outline=None, **style
) -> None:
    """A frame of ``xyxy`` in pixels; ``outline`` is the colour of a wider line beneath it."""
    x0, y0, x1, y1 = (float(v) for v in box)
    if outline is not None:
        beneath = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, lw=width + 1.1, ec=outline)
        axis.add_patch(beneath)
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, lw=width, ec=color, **style))


def figure_stems(files: Sequence[str | Path], folder: Path, kind: str) -> list[Path]:
    """A path without suffix for the figure of each picture, ``folder/NAME_kind``, no two the same.

    Pictures of one name in several folders are numbered.
    """
    names = distinct_names([Path(file).stem for file in files])
    return [folder / f"{name}_{kind}" for name in names]


def save_figure(figure: Figure, stem: str | Path) -> list[str]:
    """Write ``stem``.png and ``stem``.pdf, both or, if drawing fails, none.

    Returns:
        the paths written.

    Raises:
        OSError: they cannot be written.
    """
    stem = Path(stem)
    fix_layout(figure)  # once, not again for each format
    drawn = {}
    for suffix, options in ((".png", {}), (".pdf", {"metadata": {"CreationDate": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], dpi=_DPI, **options)
        drawn[stem.with_name(stem.name + suffix)] = buffer.getvalue()
    for path, content in drawn.items():
        write_durably(path, lambda file, content=content: file.write(content))
    return [str(path) for path in drawn]
