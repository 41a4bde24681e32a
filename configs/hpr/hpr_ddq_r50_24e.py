"""HPR on DDQ, ResNet-50, 24 epochs: 53.3 AP published."""

from ..common.schedule import schedule_by_iterations
from .hpr_ddq_r50_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(176_000, (117_300, 161_300), warmup_iters=2000)
train.max_iter = 176_000
train.output_dir = "./output/hpr_ddq_r50_24e"
