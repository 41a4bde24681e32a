"""HPR on DINO, Swin-L, 12 epochs: no published figure."""

from ..common.models.dino_5scale_swin_l import IMAGENET_22K as _IMAGENET_22K
from ..common.models.hpr_dino_swin_l import model
from ..common.schedule import schedule_by_iterations
from .hpr_dino_r50_12e import dataloader, optimizer, train

lr_multiplier = schedule_by_iterations(88_000, (80_000,))
train.max_iter = 88_000
train.eval_period = 8000
train.checkpointer.period = 8000
train.init_checkpoint = _IMAGENET_22K
train.output_dir = "./output/hpr_dino_swin_l_12e"
