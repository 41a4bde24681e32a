"""DINO as detrex has it, for its weights; ResNet-50, 12 epochs: 49.2 AP in its report."""

from ..common.models.dino_detrex_r50 import model
from .dino_r50_4scale_12e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/dino_detrex_r50_4scale_12e"
