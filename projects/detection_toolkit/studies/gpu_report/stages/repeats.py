"""Do two equal runs end with equal weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from detectron2.utils.env import seed_all_rng
from torch import Tensor

from ..context import Context, Row, rows_of
from ..plan import NamedConfig
from .trains import run_config, train_briefly

__all__ = ["repeats", "weights_of_two_runs"]


def repeats(context: Context) -> Iterator[Row]:
    """Two short runs with ``train.deterministic=true`` of each detector."""
    for named in context.plan.repeated:
        name = f"{named.name}, two runs with train.deterministic=true"
        yield from rows_of(name, partial(_two_runs, context, named, name))


def weights_of_two_runs(context: Context, named: NamedConfig) -> list[dict[str, Tensor]]:
    """The weights that they end with."""
    weights = []
    for i in range(2):
        cfg = run_config(
            context,
            named,
            f"{named.name}_{i}",
            "train.deterministic=true",
            f"train.max_iter={context.plan.repeated_steps}",
        )
        seed_all_rng(cfg.train.seed)
        model, _ = train_briefly(cfg)
        weights.append({k: v.detach().cpu().clone() for k, v in model.state_dict().items()})
    return weights


def _two_runs(context: Context, named: NamedConfig, name: str) -> Iterator[Row]:
    first, second = weights_of_two_runs(context, named)
    different = [key for key in first if not torch.equal(first[key], second[key])]
    values = {"tensors": len(first), "different": len(different)}
    note = f"different: {', '.join(different[:3])}" if different else ""
    yield Row(name, values, not different, note)
