"""HPR on DDQ with large-scale jitter, ResNet-50, 12 epochs: 53.0 AP published."""

from ..common.data.hpr import large_scale_jitter as dataloader
from ..common.models.hpr_ddq_r50 import model
from ..common.schedule import schedule_by_iterations
from .hpr_ddq_r50_12e import optimizer, train

lr_multiplier = schedule_by_iterations(88_000, (80_000,), warmup_iters=2000)
train.max_iter = 88_000
train.output_dir = "./output/hpr_ddq_lsj_r50_12e"
