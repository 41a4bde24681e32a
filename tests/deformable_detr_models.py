"""Small Deformable DETRs of every variant, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from loaded_configs import load_config
from omegaconf import DictConfig
from small_runs import run_overrides
from torch import nn

from detection_toolkit.config import apply_overrides
from detection_toolkit.engine import prepare_config

TINY = "deformable_detr/deformable_detr_shapes_tiny.py"
SMALL = [
    "model.backbone.bottom_up.widths=[8,8,8,8]",
    "model.backbone.out_channels=16",
    "model.encoder.num_layers=1",
    "model.decoder.num_stages=2",
    "model.initial_queries.num_queries=6",
]
VARIANTS = {
    "plain": "deformable_detr/deformable_detr_r50_50e.py",
    "refine": "deformable_detr/deformable_detr_refine_r50_50e.py",
    "two_stage": "deformable_detr/deformable_detr_two_stage_r50_50e.py",
}


def small_config(variant: str, *overrides: str) -> DictConfig:
    """The config of a small detector of a variant."""
    config = load_config(VARIANTS[variant])
    config.model.backbone.bottom_up = load_config(TINY).model.backbone.bottom_up
    config.model.backbone.norm_groups = 4
    config.model.encoder.update(num_heads=4, ffn_channels=16, dropout=0.0)
    config.model.decoder.update(num_heads=4, ffn_channels=16, dropout=0.0)
    return apply_overrides(config, ["model.num_classes=6", *SMALL, *overrides]).model


def make_model(variant: str, *overrides: str) -> nn.Module:
    """It past its initialisation, where many layers are zero."""
    torch.manual_seed(0)
    detector = instantiate(small_config(variant, *overrides))
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return detector


def small_run(folder: Path, variant: str, *overrides: str, **dataset: Any) -> DictConfig:
    """The prepared config of a run of seconds in ``folder``; see ``small_runs.run_overrides``."""
    config = load_config(TINY)
    config.model = small_config(variant)
    keys = ("train.", "dataloader.")
    settings = [x for x in run_overrides(folder, **dataset) if x.startswith(keys)]
    return prepare_config(apply_overrides(config, [*settings, *overrides]))
