"""Small DINO and DN-Deformable-DETR detectors for tests, and those that are made of their parts."""

from __future__ import annotations

import torch
from detectron2.config import instantiate
from loaded_configs import load_config
from omegaconf import DictConfig
from torch import nn

from detection_toolkit.config import apply_overrides

VARIANTS = {
    "dino": "dino/dino_shapes_tiny.py",
    "dino_shared_head": "dino/dino_shapes_tiny.py",
    "dn_deformable": "dino/dn_deformable_shapes_tiny.py",
}
# What is made of DINO's parts, and keeps its promises.
KIN = {"align_detr": "align_detr/align_detr_shapes_tiny.py", "ddq": "ddq/ddq_shapes_tiny.py"}
SMALL = [
    "model.backbone.bottom_up.widths=[8,8,8,8]",
    "model.backbone.out_channels=16",
    "model.backbone.norm_groups=4",
    "model.encoder.num_layers=1",
    "model.encoder.ffn_channels=16",
    "model.decoder.num_stages=2",
    "model.decoder.ffn_channels=16",
    "model.initial_queries.num_queries=6",
]


def small_config(variant: str, *overrides: str) -> DictConfig:
    """The config of a small detector of a variant."""
    shared = ["model.decoder.shared_head=true"] if variant == "dino_shared_head" else []
    cfg = apply_overrides(load_config({**VARIANTS, **KIN}[variant]), [*SMALL, *shared, *overrides])
    return cfg.model


def make_model(variant: str, *overrides: str) -> nn.Module:
    """It in float64, in training, past its initialisation, where many layers are zero."""
    torch.manual_seed(0)
    detector = instantiate(small_config(variant, *overrides)).double()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return detector.train()
