"""HPR on Align-DETR, Swin-L, 24 epochs: 59.3 AP published."""

from ..common.schedule import schedule_by_iterations
from .hpr_align_detr_swin_l_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(176_000, (117_300, 161_300))
train.max_iter = 176_000
train.output_dir = "./output/hpr_align_detr_swin_l_24e"
