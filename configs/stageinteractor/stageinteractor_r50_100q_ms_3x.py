"""ResNet-50, 100 queries, multi-scale training, 36 epochs."""

from ..common.schedule import ITERATIONS_PER_EPOCH
from ..common.schedule import schedule_3x as lr_multiplier  # noqa: F401
from .stageinteractor_r50_100q_ms_1x import dataloader, model, optimizer, train  # noqa: F401

# 36 epochs of 7,330 iterations (117,266 images, 16 an iteration); rate x0.1 after 27 and 33.
train.max_iter = 36 * ITERATIONS_PER_EPOCH
train.output_dir = "output/stageinteractor_r50_100q_ms_3x"
