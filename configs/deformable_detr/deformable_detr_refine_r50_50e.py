"""Deformable DETR with box refinement, ResNet-50, 50 epochs: 46.1 AP in MMDetection's report."""

from ..common.models.deformable_detr_refine_r50 import model  # noqa: F401
from .deformable_detr_r50_50e import dataloader, lr_multiplier, optimizer, train  # noqa: F401

train.output_dir = "./output/deformable_detr_refine_r50_50e"
