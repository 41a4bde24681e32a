"""DDQ-DETR, ResNet-50, 300 queries, 24 epochs, with the schedule of DINO."""

from ..common.schedule import ITERATIONS_PER_FULL_EPOCH as _EPOCH
from ..common.schedule import schedule_by_iterations
from .ddq_r50_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(24 * _EPOCH, (20 * _EPOCH,), warmup_iters=2000)
train.max_iter = 24 * _EPOCH
train.output_dir = "./output/ddq_r50_24e"
