"""What a training step of each variant costs, measured apart from the trainings.

Cells share the machine with each other, and some are interrupted; the peak of a whole training
holds libraries and loaders, too. So neither says what a variant costs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.steps import StepCost, call_in_process, cost_of_a_step  # noqa: E402

from detection_toolkit.config import apply_overrides, get_config  # noqa: E402
from detection_toolkit.engine import Trainer, prepare_config  # noqa: E402
from detection_toolkit.errors import UserError

from .plan import Plan  # noqa: E402

__all__ = ["STEPS", "measure", "measure_variants"]

STEPS = 10


def measure(
    config: str, overrides: Sequence[str], *, threads: int, steps: int = STEPS
) -> tuple[StepCost, str]:
    """Train a few steps of a config in this process, from its initial weights.

    Every config with the same data sees the same images. Averaging, checkpoints and evaluation are
    not in it.

    Returns:
        the cost, and the device.
    """
    torch.set_num_threads(threads)
    cfg = apply_overrides(get_config(config), overrides)
    with tempfile.TemporaryDirectory() as folder, EventStorage():
        cfg.train.output_dir = folder
        prepare_config(cfg)
        seed_all_rng(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        device = str(cfg.train.device)
        cost = cost_of_a_step(
            trainer.run_step, trainer.optimizer.zero_grad, device=device, steps=steps
        )
    return cost, device


def measure_variants(plan: Plan, *, threads: int) -> dict[str, dict[str, Any]]:
    """:func:`measure` each variant, each in a process of its own; by variant, for JSON.

    Raises:
        ValueError: a variant cannot be trained; names it.
        OSError: a process has ended, as for lack of memory.
    """
    costs = {}
    for name, overrides in tqdm(plan.variants.items(), "costs", unit=" variants"):
        arguments = (plan.config, (*plan.overrides, *overrides))
        try:
            cost, device = call_in_process(measure, *arguments, threads=threads)
        except (ValueError, KeyError) as error:
            raise UserError(f"variant {name!r}: {error.args[0]}") from error
        costs[name] = {
            "seconds": cost.seconds,
            "memory_mb": cost.memory,
            "steps": STEPS,
            "threads": threads,
            "device": device,
        }
    return costs
