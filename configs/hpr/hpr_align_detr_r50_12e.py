"""HPR on Align-DETR, ResNet-50, 12 epochs: 52.1 AP published."""

from ..common.models.hpr_align_detr_r50 import model
from .hpr_dino_r50_12e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/hpr_align_detr_r50_12e"
