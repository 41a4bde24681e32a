"""Hooks that Detectron2 lacks."""

from __future__ import annotations

from typing import Any

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
    """Detectron2's ``BestCheckpointer`` that remembers the best value when a run is resumed."""

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_metric = state["best_metric"]
        self.best_iter = state["best_iter"]
