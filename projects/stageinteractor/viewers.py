"""How much the stages reuse of each other's filters, as a panel in the figure of the stages.

Letters: N queries, n earlier stages whose channel filters a stage reuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from detection_toolkit.visualization import LABEL_SIZE, STAGE_VIEWERS, StageViewer

from .mixing import CascadeDynamicMixing
from .stage import DecoderStage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FilterReuse", "ReusedFilters"]


@dataclass
class ReusedFilters:
    """What one stage reuses for one picture; tensors on the CPU."""

    channel_sources: tuple[int, ...] = ()
    """The n earlier stages, counted from 0, whose channel filters are reused."""
    channel_shares: Tensor | None = None
    """(N, n) share of the reused filter in the adapted one, ``M'' = M + diag(r) (M_j - M)
    diag(c)``: the mean of ``r c`` over entries and groups, between 0 and 1. None without any."""
    spatial_source: int | None = None
    """The earlier stage whose spatial filters are reused."""
    spatial_shares: Tensor | None = None
    """(N,) likewise the mean of ``a b`` over the entries of the adapted spatial filters."""


@STAGE_VIEWERS.register()
class FilterReuse(StageViewer):
    """Share of each earlier stage's filters in those of each stage."""

    def applies_to(self, stages: Sequence[nn.Module]) -> bool:
        """Stages that hand a filter bank on, whether or not they read it."""
        return all(isinstance(stage, DecoderStage) for stage in stages)

    @contextlib.contextmanager
    def recording(self, stages: Sequence[nn.Module]) -> Iterator[list[ReusedFilters]]:
        """The records of a forward pass; see :class:`ReusedFilters`."""
        records = [ReusedFilters() for _ in stages]
        with contextlib.ExitStack() as hooks:
            for index, stage in enumerate(stages):
                if isinstance(stage.mixing, CascadeDynamicMixing):
                    hook = _keep_shares(records[index], index)
                    hooks.callback(stage.mixing.register_forward_pre_hook(hook).remove)
            yield records

    def draw(self, axis: Axes, records: Sequence[ReusedFilters]) -> None:
        """Cell (source, stage): share of the source's filter in the adapted one, over all queries,
        with its standard deviation."""
        count = len(records)
        values = np.full((count, count), np.nan)  # rows: sources 1 to S - 1, then spatial
        spread = np.full((count, count), np.nan)
        for stage, record in enumerate(records):
            if record.channel_shares is not None:
                for source, shares in zip(record.channel_sources, record.channel_shares.unbind(1)):
                    values[source, stage] = shares.mean()
                    spread[source, stage] = shares.std(correction=0)
            if record.spatial_shares is not None:
                values[count - 1, stage] = record.spatial_shares.mean()
                spread[count - 1, stage] = record.spatial_shares.std(correction=0)
        axis.set_title("share of reused filters", fontsize=7, pad=2.5)
        top = max(0.5, np.nanmax(values)) if np.isfinite(values).any() else 1.0
        axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=top, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                axis.text(
                    x,
                    y,
                    f"{value:.2f}\n±{spread[y, x]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=LABEL_SIZE - (0.8 if count > 5 else 0),
                    color="white" if value > 0.6 * top else "black",
                    linespacing=0.95,
                )
            else:
                axis.text(x, y, "·", ha="center", va="center", fontsize=LABEL_SIZE, color="0.6")
        names = [f"channel, {t}" for t in range(1, count)] + ["spatial,\nstage before"]
        axis.set_yticks(range(count), labels=names)
        axis.set_xticks(range(count), labels=[str(t) for t in range(1, count + 1)])
        axis.axhline(count - 1.5, color="black", lw=0.6)
        axis.set_xlabel("stage that reuses", fontsize=LABEL_SIZE + 0.6, labelpad=1)
        axis.set_ylabel("filters, from stage", fontsize=LABEL_SIZE + 0.6, labelpad=1)
        axis.tick_params(labelsize=LABEL_SIZE, length=0, pad=1.5)
        for spine in axis.spines.values():
            spine.set_linewidth(0.4)
        if not np.isfinite(values).any():
            axis.text(
                0.5,
                0.5,
                "no stage reuses filters",
                ha="center",
                fontsize=7,
                transform=axis.transAxes,
            )


def _keep_shares(record: ReusedFilters, index: int):
    """A hook on the mixing of a stage, which is called as ``mixing(queries, sampled, bank)``."""

    def hook(mixing: CascadeDynamicMixing, arguments: tuple) -> None:
        queries = arguments[0]
        if mixing.channel_adapter is not None:
            column, row = mixing.channel_adapter.gate_values(queries)[0].unbind(-2)  # (N, G, e, n)
            # The mean of all products r_i c_k is the product of the means.
            shares = (column.mean(2) * row.mean(2)).mean(1)
            record.channel_shares = _to_cpu(shares)
            record.channel_sources = tuple(range(index - shares.shape[1], index))
        if mixing.spatial_adapter is not None:
            a, b = (gates[0] for gates in mixing.spatial_adapter.gate_values(queries))
            record.spatial_shares = _to_cpu((a.mean(2) * b.mean(2)).mean(1))
            record.spatial_source = index - 1

    return hook


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
