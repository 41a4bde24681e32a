"""What a training step of each variant costs, measured apart from the runs of a study.

Cells share the machine with each other, and some are interrupted; the peak of a whole run holds
libraries and loaders, too. So neither says what a variant costs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from tqdm import tqdm

from ..config import apply_overrides, get_config
from ..defaults import STEPS_OF_COSTS
from ..engine import Trainer, prepare_config
from ..errors import UserError
from .plan import Plan
from .steps import StepCost, call_in_process, cost_of_a_step

__all__ = ["measure", "measure_variants", "random_batch"]

OBJECTS = 7  # in each random image

Step = tuple[Callable[[], None], Callable[[], None]]


def measure(
    config: str,
    overrides: Sequence[str],
    *,
    threads: int,
    steps: int = STEPS_OF_COSTS,
    random_images: tuple[int, int, int] | None = None,
    trust_config: bool = False,
) -> tuple[StepCost, str]:
    """Train a few steps of a config in this process, from its initial weights.

    Every config with the same data sees the same images. Averaging, checkpoints and evaluation are
    not in it.

    Args:
        random_images: (images per step, height, width) in pixels: train on noise of this size
            instead of the config's data, which need not be there, and without the trainer around
            model and optimiser.
        trust_config: see :func:`~detection_toolkit.config.get_config`.

    Returns:
        the cost, and the device.
    """
    torch.set_num_threads(threads)
    cfg = apply_overrides(get_config(config, trust_config=trust_config), overrides)
    source = _on_data(cfg) if random_images is None else _on_noise(cfg, *random_images)
    device = str(cfg.train.device)
    with source as (step, free_gradients):
        return cost_of_a_step(step, free_gradients, device=device, steps=steps), device


@contextmanager
def _on_data(cfg: DictConfig) -> Iterator[Step]:
    with tempfile.TemporaryDirectory() as folder, EventStorage():
        cfg.train.output_dir = folder
        prepare_config(cfg)
        seed_all_rng(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        yield trainer.run_step, trainer.optimizer.zero_grad


@contextmanager
def _on_noise(cfg: DictConfig, count: int, height: int, width: int) -> Iterator[Step]:
    torch.manual_seed(0)
    detector = instantiate(cfg.model).to(cfg.train.device).train()
    cfg.optimizer.params.model = detector
    optimizer = instantiate(cfg.optimizer)
    batch = random_batch(count, (height, width), int(cfg.model.num_classes))

    def step() -> None:
        optimizer.zero_grad()
        sum(detector(batch).values()).backward()
        optimizer.step()

    yield step, optimizer.zero_grad


def random_batch(count: int, size: tuple[int, int], num_classes: int) -> list[dict[str, Any]]:
    """Images of noise, (height, width) pixels, with random objects, in Detectron2's format."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    batch = []
    for _ in range(count):
        corners = torch.rand(OBJECTS, 2, 2, generator=generator).sort(1).values
        boxes = (corners * torch.tensor([width, height])).flatten(1)
        instances = Instances(
            size,
            gt_boxes=Boxes(boxes),
            gt_classes=torch.randint(num_classes, (OBJECTS,), generator=generator),
        )
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def measure_variants(
    plan: Plan,
    *,
    threads: int,
    steps: int = STEPS_OF_COSTS,
    random_images: tuple[int, int, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """:func:`measure` each variant, each in a process of its own; by variant, for JSON.

    Raises:
        UserError: a variant cannot be trained; names it.
        OSError: a process has ended, as for lack of memory.
    """
    costs = {}
    for name, overrides in tqdm(plan.variants.items(), "costs", unit=" variants"):
        try:
            cost, device = call_in_process(
                measure,
                plan.config,
                (*plan.overrides, *overrides),
                threads=threads,
                steps=steps,
                random_images=random_images,
                trust_config=plan.trust_config,
            )
        except UserError as error:
            raise UserError(f"variant {name!r}: {error}") from error
        costs[name] = {
            "seconds": cost.seconds,
            "memory_mb": cost.memory,
            "steps": steps,
            "threads": threads,
            "device": device,
            **({} if random_images is None else {"random_images": list(random_images)}),
        }
    return costs
