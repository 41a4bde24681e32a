"""Align-DETR, ResNet-50, four levels, 12 epochs: 50.2 AP in the comparison of the HPR paper."""

from ..common.models.align_detr_r50 import model
from ..dino.dino_r50_4scale_12e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/align_detr_r50_12e"
