"""Hooks that Detectron2 lacks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["BestCheckpointer", "EMAHook", "build_ema"]


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of parameters and buffers, as a model of its own.

    Raises:
        ValueError: the decay is not in (0, 1).
    """
    if not 0.0 < decay < 1.0:
        raise ValueError(f"train.ema.decay must lie between 0 and 1, got {decay}")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averaged.requires_grad_(False)
    return averaged


class EMAHook(HookBase):
    """Updates the average after every step. The first update copies the weights."""

    def __init__(self, averaged: AveragedModel, model: nn.Module):
        self.averaged = averaged
        self.model = model

    @torch.no_grad()
    def after_step(self) -> None:
        self.averaged.update_parameters(self.model)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's ``BestCheckpointer`` that a resumed run does not start anew.

    The best value stands in a file beside the checkpoint that has it: a run is resumed from a
    checkpoint that was written before the evaluation of the same iteration.
    """

    @property
    def _record(self) -> Path:
        return Path(self._checkpointer.save_dir, f"{self._file_prefix}.json")

    def before_train(self) -> None:
        if self.trainer.start_iter == 0 or not self._record.is_file():
            return
        record = json.loads(self._record.read_text(encoding="utf-8"))
        if record["metric"] == self._val_metric:
            self.best_metric, self.best_iter = record["value"], record["iteration"]

    def _update_best(self, val: float, iteration: int) -> bool:
        if not super()._update_best(val, iteration):
            return False
        record = {"metric": self._val_metric, "value": val, "iteration": iteration}
        self._record.write_text(json.dumps(record), encoding="utf-8")
        return True
