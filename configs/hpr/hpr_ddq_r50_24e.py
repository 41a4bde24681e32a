"""HPR on DDQ, ResNet-50, 24 epochs: 53.3 AP published."""

from ..common.schedule import step_schedule, warmed_up
from .hpr_ddq_r50_12e import dataloader, model, optimizer, train

lr_multiplier = warmed_up(step_schedule(176_000, (117_300, 161_300)), 176_000)
train.max_iter = 176_000
train.output_dir = "./output/hpr_ddq_r50_24e"
