"""What a training step of each variant costs, measured apart from the trainings.

Cells share the machine with each other, and some are interrupted; the peak of a whole training
holds libraries and loaders, too. So neither says what a variant costs.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.steps import StepCost, cost_of_a_step  # noqa: E402

from stageinteractor.config import apply_overrides, get_config  # noqa: E402
from stageinteractor.engine import Trainer, prepare_config  # noqa: E402

from .plan import Plan  # noqa: E402

__all__ = ["STEPS", "measure", "measure_variants"]

STEPS = 10


def measure(config: str, overrides: Sequence[str], *, threads: int, steps: int = STEPS) -> StepCost:
    """Train a few steps of a config in this process, from its initial weights.

    Every config sees the same images. Averaging, checkpoints and evaluation are not in it.
    """
    torch.set_num_threads(threads)
    cfg = apply_overrides(get_config(config), [*overrides, "train.seed=0"])
    with tempfile.TemporaryDirectory() as folder, EventStorage():
        cfg.train.output_dir = folder
        prepare_config(cfg)
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        return cost_of_a_step(
            trainer.run_step,
            trainer.optimizer.zero_grad,
            device=cfg.train.device,
            steps=steps,
        )


def measure_variants(plan: Plan, *, threads: int) -> dict[str, dict[str, Any]]:
    """:func:`measure` each variant, each in a process of its own; by variant, for JSON."""
    context = multiprocessing.get_context("spawn")
    costs = {}
    for name, overrides in tqdm(plan.variants.items(), "costs", unit=" variants"):
        with context.Pool(1, initializer=logging.disable, initargs=(logging.INFO,)) as pool:
            cost = pool.apply(
                measure, (plan.config, (*plan.overrides, *overrides)), {"threads": threads}
            )
        costs[name] = {
            "seconds": cost.seconds,
            "memory_mb": cost.memory,
            "steps": STEPS,
            "threads": threads,
        }
    return costs
