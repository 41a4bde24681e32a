"""Does it train: AP from scratch, the loop with its loader, and one process of NCCL."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ....data.shapes import SHAPES, generate_shapes
from ....engine import Trainer, prepare_config
from ....engine.train_loop import DetectionTrainLoop
from ..context import Context, Row, rows_of
from ..plan import NamedConfig
from .correct import random_images

__all__ = ["run_config", "train_briefly", "trains"]

CONNECTING = timedelta(seconds=30)
MEASURED_STEPS = 40
# Of the stage's time: two runs from scratch with their evaluation.
SHARE, EVALUATION = 0.35, 20.0


def trains(context: Context) -> Iterator[Row]:
    """Distributed training by one process, the full-size loop, two precisions from scratch."""
    precisions = ("bfloat16", "float16") if context.on_gpu else ("bfloat16",)
    budget = context.seconds_left() * SHARE
    yield from rows_of("distributed", partial(_distributed, context))
    yield from rows_of("loop", partial(_loop, context))
    for precision in precisions:
        yield from rows_of(precision, partial(_from_scratch, context, precision, budget))


def run_config(context: Context, config: NamedConfig, folder: str, *overrides: str) -> DictConfig:
    """A config for a run of the report: on its device, into a folder of its own."""
    data = []
    if context.plan.drawn_images:
        drawn = context.folder / "shapes"
        spec = SHAPES["shapes_val"]
        generate_shapes(
            type(spec)(num_images=context.plan.drawn_images, seed=spec.seed), drawn, workers=1
        )
        for part in ("train", "test"):
            data += [
                f"dataloader.{part}.dataset.json_file='{drawn / 'annotations.json'}'",
                f"dataloader.{part}.dataset.image_root='{drawn / 'images'}'",
                f"dataloader.{part}.num_workers=0",
            ]
        data += ["dataloader.train.total_batch_size=2"]
    cfg = config.load(
        *data,
        f"train.output_dir='{context.folder / folder}'",
        f"train.device={context.device}",
        "train.init_checkpoint=''",
        "train.seed=1",
        "train.eval_period=0",
        "train.checkpointer.period=1000000",
        *overrides,
    )
    return prepare_config(cfg, ())


class _Clock(HookBase):
    """Median seconds of a step and of its data, over the second half of the steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        if "time" in latest:
            self.steps.append((latest["time"][0], latest["rank_data_time"][0]))

    def medians(self) -> tuple[float, float]:
        steps = self.steps[len(self.steps) // 2 :]
        return tuple(sorted(column)[len(column) // 2] for column in zip(*steps))


class _WithoutEvaluation(Trainer):
    def build_hooks(self) -> list[Any]:
        return [hook for hook in super().build_hooks() if not isinstance(hook, hooks.EvalHook)]


def train_briefly(cfg: DictConfig) -> tuple[nn.Module, _Clock]:
    """Train without an evaluation at the end; returns the model, and what the steps took."""
    trainer = _WithoutEvaluation(cfg)
    clock = _Clock()
    trainer.register_hooks([clock])
    trainer.train()
    return trainer.model, clock


def _from_scratch(context: Context, precision: str, budget: float) -> Iterator[Row]:
    plan = context.plan
    amp = [
        *("train.amp.enabled=true", f"train.amp.precision={precision}"),
        "train.ema.enabled=false",  # one evaluation; an average gains little in so few steps
    ]
    steps = plan.training_steps
    if steps > MEASURED_STEPS:
        short = run_config(
            context,
            plan.training,
            f"measured_{precision}",
            *amp,
            f"train.max_iter={MEASURED_STEPS}",
        )
        _, clock = train_briefly(short)
        seconds, _ = clock.medians()
        steps = max(MEASURED_STEPS, min(steps, int((budget - EVALUATION) / seconds)))
    cfg = run_config(context, plan.training, precision, *amp, f"train.max_iter={steps}")
    trainer = Trainer(cfg)
    clock = _Clock()
    trainer.register_hooks([clock])
    results = trainer.train() or {}
    seconds, data = clock.medians()
    ap = results.get("bbox", {}).get("AP")
    on_cpu = run_config(context, plan.training, f"{precision}_on_cpu", "train.device=cpu")
    beside = Trainer.test(on_cpu, trainer.model.to("cpu"))
    values = {
        "iterations": steps,
        "AP": ap,
        "AP of these weights on the CPU, float32": beside["bbox"]["AP"],
        "ms a step": 1e3 * seconds,
        "of it data (ms)": 1e3 * data,
        "skipped steps": trainer._trainer.state_dict()["skipped_steps"][0],
    }
    yield Row(f"{plan.training.name} from scratch, {precision}", values, ap is not None)


def _loop(context: Context) -> Iterator[Row]:
    plan = context.plan
    cfg = run_config(
        context,
        plan.loop,
        "loop",
        "train.amp.enabled=true",
        "train.amp.precision=bfloat16",
        f"train.max_iter={plan.loop_steps}",
    )
    _, clock = train_briefly(cfg)
    seconds, data = clock.medians()
    batch = cfg.dataloader.train.total_batch_size
    values = {
        "iterations": plan.loop_steps,
        "ms a step": 1e3 * seconds,
        "data (ms)": 1e3 * data,
        "device and host (ms)": 1e3 * (seconds - data),
        "images/s": batch / seconds,
    }
    yield Row(f"loop of {Path(plan.loop.config).stem}, bfloat16, batch {batch}", values)


def _distributed(context: Context) -> Iterator[Row]:
    """One step of a model that is distributed over one process."""
    backend = "nccl" if context.on_gpu else "gloo"
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=CONNECTING
    )
    try:
        cfg = copy.deepcopy(context.plan.training.load())
        torch.manual_seed(0)
        model = instantiate(cfg.model).to(context.device)
        images = random_images(context.plan.compared_size, model.num_classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loop = DetectionTrainLoop(
            DistributedDataParallel(model), [images], optimizer, device=str(context.device)
        )
        with EventStorage() as storage:
            loop.run_step()
        loss = storage.latest()["total_loss"][0]
        yield Row(f"one process of {backend}", {"total loss": loss}, True)
    finally:
        dist.destroy_process_group()
