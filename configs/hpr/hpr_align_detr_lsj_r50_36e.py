"""HPR on Align-DETR with large-scale jitter, ResNet-50, 36 epochs: 55.2 AP published."""

from ..common.schedule import schedule_by_iterations
from .hpr_align_detr_lsj_r50_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(264_000, (205_300, 249_300))
train.max_iter = 264_000
train.output_dir = "./output/hpr_align_detr_lsj_r50_36e"
