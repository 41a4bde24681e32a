"""HPR on DDQ, Swin-L, 36 epochs: no published figure."""

from ..common.schedule import schedule_by_iterations
from .hpr_ddq_swin_l_12e import dataloader, model, optimizer, train

lr_multiplier = schedule_by_iterations(264_000, (205_300, 249_300), warmup_iters=2000)
train.max_iter = 264_000
train.output_dir = "./output/hpr_ddq_swin_l_36e"
