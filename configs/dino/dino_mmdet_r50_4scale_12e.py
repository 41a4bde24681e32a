"""DINO as MMDetection 3 has it, for its weights; ResNet-50, 12 epochs: 49.0 AP in its report."""

from ..common.models.dino_mmdet_r50 import model
from .dino_r50_4scale_12e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/dino_mmdet_r50_4scale_12e"
