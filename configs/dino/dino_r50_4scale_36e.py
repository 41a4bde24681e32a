"""DINO, ResNet-50, four levels, 36 epochs: 50.9 AP published."""

from ..common.schedule import ITERATIONS_PER_FULL_EPOCH as _EPOCH
from ..common.schedule import one_drop_schedule
from .dino_r50_4scale_12e import dataloader, model, optimizer, train

lr_multiplier = one_drop_schedule(36, 30)
train.max_iter = 36 * _EPOCH
train.output_dir = "./output/dino_r50_4scale_36e"
