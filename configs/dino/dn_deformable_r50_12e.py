"""DN-Deformable-DETR, ResNet-50, 300 queries, 12 epochs."""

from ..common.models.dn_deformable_r50 import model
from .dino_r50_4scale_12e import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/dn_deformable_r50_12e"
