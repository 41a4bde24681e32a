"""Two-stage Deformable DETR, 50 epochs at 16 images per step, half the released batch."""

from ..common.models.deformable_detr_two_stage_r50 import model  # noqa: F401
from .deformable_detr_r50_50e_b16 import dataloader, lr_multiplier, optimizer, train  # noqa: F401

# Proposals are boxes: no linear layer makes points of positions.
del optimizer.params.lr_factors[r"\.reference_points\."]
train.output_dir = "./output/deformable_detr_two_stage_r50_50e_b16"
