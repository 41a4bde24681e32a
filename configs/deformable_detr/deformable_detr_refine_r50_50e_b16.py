"""Deformable DETR with box refinement, 50 epochs at 16 images per step, half the released batch."""

from ..common.models.deformable_detr_refine_r50 import model  # noqa: F401
from .deformable_detr_r50_50e_b16 import dataloader, lr_multiplier, optimizer, train  # noqa: F401

train.output_dir = "./output/deformable_detr_refine_r50_50e_b16"
