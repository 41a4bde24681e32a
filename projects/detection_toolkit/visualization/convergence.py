"""Curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .curves import _figure, _save
from .fonts import drawable

__all__ = ["plot_convergence"]


def plot_convergence(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    output: str | Path,
    *,
    title: str = "",
    metric: str = "AP (%)",
) -> str:
    """Draw how variants converge: the mean over the seeds, and the range that they span.

    Args:
        curves: {variant: one curve a seed, each a list of (iteration, value)}. The mean is drawn
            at the iterations that all curves of the variant have; values must be finite there.
        output: picture to write, PNG, PDF or SVG; its folder is created.
        title: of the picture.
        metric: what the values are.

    Returns:
        the path written.

    Raises:
        ValueError: there is nothing to draw.
    """
    figure, (axis,) = _figure(1)
    drawn = False
    for index, (name, runs) in enumerate(curves.items()):
        by_iteration = [{i: v for i, v in run if np.isfinite(v)} for run in runs]
        shared = sorted(set.intersection(*map(set, by_iteration))) if by_iteration else []
        if not shared:
            continue
        drawn = True
        values = np.array([[run[i] for i in shared] for run in by_iteration])
        mean, color = values.mean(0), f"C{index}"
        axis.fill_between(shared, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        number = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
        label = f"{drawable(name)}: {mean[-1]:.2f} ({number})"
        axis.plot(shared, mean, color=color, marker="o", markersize=3, label=label)
    if not drawn:
        raise UserError("no finished training has an evaluation that could be drawn")
    axis.set_title(drawable(title))
    axis.set_ylabel(metric)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper left")
    return _save(figure, output)
