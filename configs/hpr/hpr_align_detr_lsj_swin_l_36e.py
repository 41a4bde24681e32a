"""HPR on Align-DETR with large-scale jitter, Swin-L, 36 epochs: 60.0 AP published."""

from ..common.schedule import schedule_by_iterations
from .hpr_align_detr_lsj_swin_l_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(264_000, (205_300, 249_300))
train.max_iter = 264_000
train.output_dir = "./output/hpr_align_detr_lsj_swin_l_36e"
