"""What the refiners do, as panels in the figure of the stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from detection_toolkit.visualization import LABEL_SIZE, STAGE_VIEWERS, StageViewer

from .decoder import REGIONAL
from .regional_attention import RegionalCrossAttention
from .stage import HybridStage, Refiner

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MergeWeights", "RegionalAttention"]


class _OfHybridStages(StageViewer):
    def applies_to(self, stages: Sequence[nn.Module]) -> bool:
        """Hybrid stages."""
        return all(isinstance(stage, HybridStage) for stage in stages)


@STAGE_VIEWERS.register()
class MergeWeights(_OfHybridStages):
    """Weights of the refiners where a stage adds them up."""

    @contextlib.contextmanager
    def recording(self, stages: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
        """Of each stage (2, F, C) weights of the F refiners, after self-attention and after the
        feed-forward networks; C is 1 where all channels have one."""
        records = []
        for stage in stages:
            assert isinstance(stage, HybridStage)
            merges = [stage.merge_attended.weights, stage.merge_refined.weights]
            weights = torch.stack([x.detach().float().cpu() for x in merges])
            records.append(weights.reshape(2, -1, weights.shape[-1]).transpose(1, 2))
        yield records

    def draw(self, axis: Axes, records: Sequence[Tensor]) -> None:
        """Cell (refiner, stage): mean over channels, with its standard deviation."""
        names = ["primary", "dynamic", "regional"]
        weights = torch.stack(list(records)).flatten(1, 2)  # (S, 2 F, C)
        values, spread = weights.mean(-1).t().numpy(), weights.std(-1, correction=0).t().numpy()
        top = max(1.0, float(np.abs(values).max()))
        axis.set_title("weights of the refiners", fontsize=7, pad=2.5)
        axis.imshow(values, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            axis.text(
                x,
                y,
                f"{value:.2f}\n±{spread[y, x]:.2f}",
                ha="center",
                va="center",
                fontsize=LABEL_SIZE,
                color="white" if abs(value) > 0.6 * top else "black",
                linespacing=0.95,
            )
        places = ["attention", "FFN"]
        labels = [f"{place},\n{name}" for place in places for name in names]
        axis.set_yticks(range(len(labels)), labels=labels)
        axis.axhline(len(names) - 0.5, color="black", lw=0.6)
        axis.set_xticks(range(len(records)), labels=[str(t + 1) for t in range(len(records))])
        axis.set_xlabel("stage", fontsize=LABEL_SIZE + 0.6, labelpad=1)
        _thin(axis)


@STAGE_VIEWERS.register()
class RegionalAttention(_OfHybridStages):
    """Which cells of its region a query looks at, by regional cross-attention."""

    @contextlib.contextmanager
    def recording(self, stages: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
        """Of each stage (side, side) the mean over queries, samples and heads."""
        records: list[Tensor | None] = [None for _ in stages]

        def keep(index: int):
            def hook(look: RegionalCrossAttention, arguments: tuple[Tensor, Tensor]) -> None:
                weights = look.weights(*arguments).mean((0, 1, 2)).detach().float().cpu()
                side = int(len(weights) ** 0.5)
                records[index] = weights.view(side, side)

            return hook

        with contextlib.ExitStack() as hooks:
            for index, stage in enumerate(stages):
                assert isinstance(stage, HybridStage)
                refiner: Any = stage.auxiliary[REGIONAL]
                assert isinstance(refiner, Refiner)
                hooks.callback(refiner.look.register_forward_pre_hook(keep(index)).remove)
            yield records

    def draw(self, axis: Axes, records: Sequence[Tensor | None]) -> None:
        """The regions of all stages, in two rows; 1 is as much as of any cell."""
        maps = [x * x.numel() for x in records if x is not None]
        side, columns = maps[0].shape[0], -(-len(maps) // 2)
        step = side + 1  # with a gap
        whole = np.full((2 * step - 1, columns * step - 1), np.nan)
        axis.set_title("look at the region", fontsize=7, pad=2.5)
        for index, x in enumerate(maps):
            top, left = (step * place for place in divmod(index, columns))
            whole[top : top + side, left : left + side] = x.numpy()
            axis.text(left - 0.2, top - 0.2, index + 1, ha="left", va="top", fontsize=LABEL_SIZE)
        low, high = np.nanmin(whole), np.nanmax(whole)
        axis.imshow(whole, cmap="YlGnBu", vmin=0, vmax=max(2.0, high))
        axis.set_yticks([])
        axis.set_xticks([])
        axis.set_xlabel(
            f"regional cross-attention, by stage:\na cell has {low:.2f} to {high:.2f} of the mean",
            fontsize=LABEL_SIZE,
            labelpad=2,
        )
        _thin(axis)


def _thin(axis: Axes) -> None:
    axis.tick_params(labelsize=LABEL_SIZE, length=0, pad=1.5)
    for spine in axis.spines.values():
        spine.set_linewidth(0.4)
