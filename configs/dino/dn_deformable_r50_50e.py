"""DN-Deformable-DETR, ResNet-50, 300 queries, 50 epochs: 49.5 AP published."""

from ..common.models.dn_deformable_r50 import model
from ..common.schedule import ITERATIONS_PER_FULL_EPOCH as _EPOCH
from ..common.schedule import one_drop_schedule
from .dino_r50_4scale_12e import dataloader, optimizer, train

lr_multiplier = one_drop_schedule(50, 40)
train.max_iter = 50 * _EPOCH
train.output_dir = "./output/dn_deformable_r50_50e"
