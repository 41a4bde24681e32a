"""HPR on Align-DETR with large-scale jitter, ResNet-50, 24 epochs: 54.6 AP published."""

from ..common.schedule import schedule_by_iterations
from .hpr_align_detr_lsj_r50_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(176_000, (117_300, 161_300))
train.max_iter = 176_000
train.output_dir = "./output/hpr_align_detr_lsj_r50_24e"
