"""HPR on DDQ, Swin-L, 36 epochs: no published figure."""

from ..common.schedule import step_schedule, warmed_up
from .hpr_ddq_swin_l_12e import dataloader, model, optimizer, train

lr_multiplier = warmed_up(step_schedule(264_000, (205_300, 249_300)), 264_000)
train.max_iter = 264_000
train.output_dir = "./output/hpr_ddq_swin_l_36e"
