"""DDQ-DETR, ResNet-50, 300 queries, 12 epochs: 50.9 AP in the comparison of the HPR paper."""

from ..common.models.ddq_r50 import model
from ..common.schedule import ITERATIONS_PER_FULL_EPOCH as _EPOCH
from ..common.schedule import schedule_by_iterations
from ..dino.dino_r50_4scale_12e import dataloader, optimizer, train

optimizer.lr = 2e-4
optimizer.weight_decay = 0.05
lr_multiplier = schedule_by_iterations(12 * _EPOCH, (11 * _EPOCH,), warmup_iters=2000)

train.output_dir = "./output/ddq_r50_12e"
