"""HPR on DDQ, Swin-L, 12 epochs: 58.7 AP published."""

from ..common.models.dino_5scale_swin_l import IMAGENET_22K as _IMAGENET_22K
from ..common.models.hpr_ddq_swin_l import model
from ..common.schedule import schedule_by_iterations
from .hpr_ddq_r50_12e import dataloader, optimizer, train

lr_multiplier = schedule_by_iterations(88_000, (80_000,), warmup_iters=2000)
train.max_iter = 88_000
train.init_checkpoint = _IMAGENET_22K
train.output_dir = "./output/hpr_ddq_swin_l_12e"
