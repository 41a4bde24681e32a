"""Align-DETR, ResNet-50, four levels, 24 epochs, with the schedule of DINO."""

from ..common.models.align_detr_r50 import model
from ..dino.dino_r50_4scale_24e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/align_detr_r50_24e"
