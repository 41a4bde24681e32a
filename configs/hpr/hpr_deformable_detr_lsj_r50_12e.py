"""HPR on the improved Deformable DETR with large-scale jitter, ResNet-50, 12 epochs."""

from ..common.data.hpr import large_scale_jitter as dataloader
from ..common.models.hpr_deformable_detr_r50 import model
from ..common.schedule import schedule_by_iterations
from .hpr_dino_r50_12e import optimizer, train

lr_multiplier = schedule_by_iterations(88_000, (80_000,))
train.max_iter = 88_000
train.eval_period = 8000
train.checkpointer.period = 8000
train.output_dir = "./output/hpr_deformable_detr_lsj_r50_12e"
