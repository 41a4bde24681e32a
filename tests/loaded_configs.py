"""Configs and empty models that several tests look at, made once in a process.

Loading a config runs a chain of files anew; copying what was loaded takes a tenth of the time.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.overrides import TorchFunctionMode

from detection_toolkit.config import get_config


@cache
def _loaded(name: str) -> DictConfig:
    return get_config(name)


def load_config(name: str) -> DictConfig:
    """A config of the project, to be changed at will. Registers data sets the first time only."""
    return copy.deepcopy(_loaded(name))


_empty: dict[str, nn.Module] = {}  # by what the config says of it


def empty_model(name: str) -> nn.Module:
    """The detector of a config as it is, on the meta device and shared: to be looked at only."""
    return shared_empty(load_config(name))


def shared_empty(config: DictConfig) -> nn.Module:
    """As :func:`build_empty`; configs with the same detector, as of 12 and 24 epochs, share it."""
    _without_pretraining(config)
    described = repr(OmegaConf.to_container(config.model, resolve=True))
    if described not in _empty:
        _empty[described] = build_empty(config)
    return _empty[described]


def _without_pretraining(config: DictConfig) -> None:
    bottom_up = config.model.backbone.get("bottom_up", {})
    if "pretrained" in bottom_up:
        bottom_up.pretrained = False


def build_empty(config: DictConfig) -> nn.Module:
    """The detector of a config on the meta device, where neither weights nor time are needed.

    Args:
        config: pretrained weights of a timm backbone are switched off in it.
    """
    _without_pretraining(config)
    with torch.device("meta"), _WithoutInitialValues():
        return instantiate(config.model)


class _WithoutInitialValues(TorchFunctionMode):
    """Leaves out what draws initial values: on the meta device it takes half of the time."""

    drawing = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_"}  # as trunc_normal_ does

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if getattr(func, "__name__", None) in self.drawing:
            return args[0]
        return func(*args, **kwargs)
