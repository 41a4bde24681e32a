"""Two-stage Deformable DETR, ResNet-50, 50 epochs: 46.8 AP in MMDetection's report."""

from ..common.models.deformable_detr_two_stage_r50 import model  # noqa: F401
from .deformable_detr_r50_50e import dataloader, lr_multiplier, optimizer, train  # noqa: F401

# Proposals are boxes: no linear layer makes points of positions.
del optimizer.params.lr_factors[r"\.reference_points\."]
train.output_dir = "./output/deformable_detr_two_stage_r50_50e"
