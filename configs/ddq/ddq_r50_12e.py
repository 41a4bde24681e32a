"""DDQ-DETR, ResNet-50, 300 queries, 12 epochs: 50.9 AP in the comparison of the HPR paper."""

from ..common.models.ddq_r50 import model
from ..common.schedule import ITERATIONS_PER_FULL_EPOCH as _EPOCH
from ..common.schedule import one_drop_schedule, warmed_up
from ..dino.dino_r50_4scale_12e import dataloader, optimizer, train

optimizer.lr = 2e-4
optimizer.weight_decay = 0.05
lr_multiplier = warmed_up(one_drop_schedule(12, 11), 12 * _EPOCH)

train.output_dir = "./output/ddq_r50_12e"
