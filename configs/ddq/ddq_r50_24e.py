"""DDQ-DETR, ResNet-50, 300 queries, 24 epochs, with the schedule of DINO."""

from ..common.schedule import ITERATIONS_PER_FULL_EPOCH as _EPOCH
from ..common.schedule import one_drop_schedule, warmed_up
from .ddq_r50_12e import dataloader, model, optimizer, train

lr_multiplier = warmed_up(one_drop_schedule(24, 20), 24 * _EPOCH)
train.max_iter = 24 * _EPOCH
train.output_dir = "./output/ddq_r50_24e"
