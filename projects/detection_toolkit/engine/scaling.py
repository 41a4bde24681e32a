"""Batch, learning rate and length of a run, by its data and the number of its processes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Collection, Sequence
from typing import Any

from detectron2.config import instantiate
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from ..errors import UserError
from .settings import RunSettings

__all__ = ["auto_scale_workers", "follow_epochs", "log_effective_batch"]

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
    _set_length(cfg, _fewer(settings.max_iter, scale), scale)
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


def follow_epochs(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Let the length of a run be ``train.max_epochs`` passes over its training set, in place.

    Evaluation and checkpoint periods keep their share of the run, unless they are given, too.

    Args:
        cfg: whose training set is there.
        overrides: the command line's. An iteration number among them takes the place of epochs
            that the config has.

    Raises:
        UserError: both are among the overrides.
    """
    settings = RunSettings.from_config(cfg.train)
    given = {text.split("=")[0].lstrip("+") for text in overrides}
    if settings.max_epochs is None:
        return
    if "train.max_iter" in given:
        if "train.max_epochs" in given:
            raise UserError("train.max_iter and train.max_epochs: give one of them")
        cfg.train.max_epochs = None
        return
    images = len(instantiate(cfg.dataloader.train.dataset))
    step = cfg.dataloader.train.total_batch_size * settings.accumulation_steps
    max_iter = max(1, math.ceil(settings.max_epochs * images / step))
    if max_iter == settings.max_iter:
        return
    _set_length(cfg, max_iter, settings.max_iter / max_iter, kept=given)
    logger.info(
        "%g epochs of %d images, %d a step, are %d iterations",
        settings.max_epochs,
        images,
        step,
        max_iter,
    )


def _set_length(
    cfg: DictConfig, max_iter: int, scale: float, *, kept: Collection[str] = ()
) -> None:
    """Change the length of a run, and with it all that is counted in iterations of it.

    Args:
        max_iter: the new one.
        scale: how many times shorter the run becomes.
        kept: periods that stay as they are.
    """
    settings = RunSettings.from_config(cfg.train)
    schedule = OmegaConf.select(cfg, "lr_multiplier.scheduler")
    updates = _num_updates(schedule)
    cfg.train.max_iter = max_iter
    if updates != _num_updates(schedule):
        schedule.milestones = [_fewer(m, scale) for m in schedule.milestones]
    periods = {
        "eval_period": settings.eval_period,
        "checkpointer.period": settings.checkpointer.period,
    }
    for key, period in periods.items():
        if period > 0 and f"train.{key}" not in kept:
            OmegaConf.update(cfg.train, key, _fewer(period, scale), force_add=True)


def log_effective_batch(cfg: DictConfig) -> None:
    """Log the images of one step of the optimiser, and the learning rate that is meant for them."""
    images = cfg.dataloader.train.total_batch_size
    accumulated = RunSettings.from_config(cfg.train).accumulation_steps
    logger.info(
        "effective batch: %d images = %d per step over %d process%s x %d accumulated; "
        "learning rate %.3g",
        images * accumulated,
        images,
        comm.get_world_size(),
        "" if comm.get_world_size() == 1 else "es",
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
