"""HPR on Align-DETR, ResNet-50, 24 epochs: 52.7 AP published."""

from ..common.models.hpr_align_detr_r50 import model
from .hpr_dino_r50_24e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/hpr_align_detr_r50_24e"
