"""HPR on DDQ, ResNet-50, 12 epochs: 52.6 AP published."""

from ..common.models.hpr_ddq_r50 import model
from ..common.schedule import schedule_by_iterations
from .hpr_dino_r50_12e import dataloader, optimizer, train

optimizer.lr = 2e-4
optimizer.weight_decay = 0.05
lr_multiplier = schedule_by_iterations(88_000, (80_000,), warmup_iters=2000)
train.max_iter = 88_000
train.eval_period = 8000
train.checkpointer.period = 8000
train.output_dir = "./output/hpr_ddq_r50_12e"
