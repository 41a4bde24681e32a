"""HPR on DDQ with large-scale jitter, ResNet-50, 36 epochs: 55.1 AP published."""

from ..common.schedule import schedule_by_iterations
from .hpr_ddq_lsj_r50_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(264_000, (205_300, 249_300), warmup_iters=2000)
train.max_iter = 264_000
train.output_dir = "./output/hpr_ddq_lsj_r50_36e"
