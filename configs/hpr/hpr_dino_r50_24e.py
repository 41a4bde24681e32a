"""HPR on DINO, ResNet-50, 24 epochs: 51.9 AP published."""

from ..common.schedule import ITERATIONS_PER_EPOCH as _EPOCH
from ..common.schedule import schedule_by_iterations
from .hpr_dino_r50_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(24 * _EPOCH, (16 * _EPOCH, 22 * _EPOCH))
train.max_iter = 24 * _EPOCH
train.output_dir = "./output/hpr_dino_r50_24e"
