"""Do two equal runs end with equal weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from detectron2.utils.env import seed_all_rng
from torch import Tensor

from ..context import Context, Row, rows_of
from .trains import run_config, train_briefly

__all__ = ["repeats", "weights_of_two_runs"]


def repeats(context: Context) -> Iterator[Row]:
    """Two short runs with ``train.deterministic=true``."""
    yield from rows_of("two equal runs", partial(_two_runs, context))


def weights_of_two_runs(context: Context) -> tuple[list[dict[str, Tensor]], set[str]]:
    """Their weights, and the operations that PyTorch has warned of."""
    weights = []
    warned: set[str] = set()
    for i in range(2):
        cfg = run_config(
            context,
            context.plan.training,
            f"repeat{i}",
            "train.deterministic=true",
            f"train.max_iter={context.plan.repeated_steps}",
        )
        seed_all_rng(cfg.train.seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, _ = train_briefly(cfg)
        weights.append({k: v.detach().cpu().clone() for k, v in model.state_dict().items()})
        texts = [str(w.message) for w in caught]
        warned |= {t.split(" ")[0] for t in texts if re.search("deterministic", t)}
    return weights, warned


def _two_runs(context: Context) -> Iterator[Row]:
    (first, second), warned = weights_of_two_runs(context)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    values = {"tensors": len(first), "different": len(different)}
    note = f"different: {', '.join(different[:3])}" if different else ""
    if warned:
        note += f"{'; ' if note else ''}not deterministic: {', '.join(sorted(warned))}"
    yield Row("two runs with train.deterministic=true", values, not different, note)
