"""Small HPR detectors for tests."""

from __future__ import annotations

import torch
from detectron2.config import instantiate
from dino_models import SMALL
from loaded_configs import load_config
from omegaconf import DictConfig
from torch import nn

from detection_toolkit.config import apply_overrides

CONFIG = "hpr/hpr_shapes_tiny.py"
RUN = [*SMALL, "model.decoder.inner_channels=4", "model.decoder.num_samples=3"]
WITHOUT_DENOISING = ["model.denoising=null", "model.criterion.denoising=null"]


def small_config(*overrides: str, config: str = CONFIG) -> DictConfig:
    """The config of a small detector."""
    return apply_overrides(load_config(config), [*RUN, *overrides]).model


def make_model(*overrides: str, config: str = CONFIG) -> nn.Module:
    """It in float64, in training, past its initialisation, where many layers are zero."""
    torch.manual_seed(0)
    detector = instantiate(small_config(*overrides, config=config)).double()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return detector.train()
