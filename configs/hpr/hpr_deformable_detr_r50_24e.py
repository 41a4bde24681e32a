"""HPR on the improved Deformable DETR, ResNet-50, 24 epochs: 51.9 AP published."""

from ..common.models.hpr_deformable_detr_r50 import model
from .hpr_dino_r50_24e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/hpr_deformable_detr_r50_24e"
