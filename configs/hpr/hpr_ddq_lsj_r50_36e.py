"""HPR on DDQ with large-scale jitter, ResNet-50, 36 epochs: 55.1 AP published."""

from ..common.schedule import step_schedule, warmed_up
from .hpr_ddq_lsj_r50_12e import dataloader, model, optimizer, train

lr_multiplier = warmed_up(step_schedule(264_000, (205_300, 249_300)), 264_000)
train.max_iter = 264_000
train.output_dir = "./output/hpr_ddq_lsj_r50_36e"
