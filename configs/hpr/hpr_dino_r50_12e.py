"""HPR on DINO, ResNet-50, 12 epochs: 51.1 AP published."""

from ..common.data.hpr import dataloader
from ..common.models.hpr_dino_r50 import model
from ..common.schedule import ITERATIONS_PER_EPOCH as _EPOCH
from ..common.schedule import schedule_by_iterations
from ..dino.dino_mmdet_r50_4scale_12e import optimizer, train

lr_multiplier = schedule_by_iterations(12 * _EPOCH, (11 * _EPOCH,))
train.max_iter = 12 * _EPOCH
train.eval_period = _EPOCH
train.checkpointer.period = _EPOCH
train.output_dir = "./output/hpr_dino_r50_12e"
