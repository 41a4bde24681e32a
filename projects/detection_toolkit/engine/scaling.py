"""Batch, learning rate and length of a run, by the number of its processes."""

from __future__ import annotations

import copy
import logging
from typing import Any

from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from ..errors import UserError
from .settings import RunSettings

__all__ = ["auto_scale_workers", "log_effective_batch"]

logger = logging.getLogger(__name__)


def auto_scale_workers(cfg: DictConfig, num_workers: int) -> DictConfig:
    """Scale batch, learning rate and length to another number of processes.

    As ``DefaultTrainer.auto_scale_workers``, by ``train.reference_world_size``: images a process
    stay the same, the learning rate grows with the batch, iterations and periods shrink. Drops and
    warm-up are shares of the run, so they follow by themselves; drops that are given in iterations
    of ``${train.max_iter}`` are scaled with it.

    Returns:
        a new config; the same one where there is nothing to scale.

    Raises:
        UserError: the batch cannot be shared evenly by the reference number of processes.
    """
    settings = RunSettings.from_config(cfg.train)
    reference = settings.reference_world_size
    if reference in (0, num_workers):
        return cfg
    cfg = copy.deepcopy(cfg)
    loader, train = cfg.dataloader.train, cfg.train
    if loader.total_batch_size % reference:
        raise UserError(
            f"train.reference_world_size={reference} does not divide "
            f"dataloader.train.total_batch_size={loader.total_batch_size}"
        )
    scale = num_workers / reference
    loader.total_batch_size = int(round(loader.total_batch_size * scale))
    cfg.optimizer.lr = cfg.optimizer.lr * scale
    schedule = OmegaConf.select(cfg, "lr_multiplier.scheduler")
    updates = _num_updates(schedule)
    train.max_iter = _fewer(settings.max_iter, scale)
    if updates != _num_updates(schedule):
        schedule.milestones = [_fewer(m, scale) for m in schedule.milestones]
    if settings.eval_period > 0:
        train.eval_period = _fewer(settings.eval_period, scale)
    period = _fewer(settings.checkpointer.period, scale)
    OmegaConf.update(train, "checkpointer.period", period, force_add=True)
    train.reference_world_size = num_workers
    logger.info(
        "scaled from %d to %d processes: batch %d, learning rate %.3g, %d iterations",
        reference,
        num_workers,
        loader.total_batch_size,
        cfg.optimizer.lr,
        train.max_iter,
    )
    return cfg


def log_effective_batch(cfg: DictConfig) -> None:
    """Log the images of one step of the optimiser, and the learning rate that is meant for them."""
    images = cfg.dataloader.train.total_batch_size
    accumulated = RunSettings.from_config(cfg.train).accumulation_steps
    logger.info(
        "effective batch: %d images = %d a step over %d processes x %d accumulated; "
        "learning rate %.3g",
        images * accumulated,
        images,
        comm.get_world_size(),
        accumulated,
        cfg.optimizer.lr,
    )


def _fewer(iterations: int, scale: float) -> int:
    return max(1, int(round(iterations / scale)))


def _num_updates(schedule: Any) -> int | None:
    """The iterations that the drops of a schedule are counted in, where it has both."""
    if not isinstance(schedule, DictConfig) or schedule.get("milestones") is None:
        return None
    return schedule.get("num_updates")
