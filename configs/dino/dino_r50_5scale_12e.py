"""DINO, ResNet-50, five levels, 12 epochs: 49.4 AP published."""

from ..common.models.dino_5scale_r50 import model
from .dino_r50_4scale_12e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/dino_r50_5scale_12e"
