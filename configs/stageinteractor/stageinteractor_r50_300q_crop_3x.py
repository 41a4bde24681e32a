"""ResNet-50, 300 queries, multi-scale and crop augmentation, 36 epochs: 48.9 AP published."""

from ..common.schedule import ITERATIONS_PER_EPOCH
from ..common.schedule import schedule_crop_3x as lr_multiplier  # noqa: F401
from .stageinteractor_r50_300q_crop_1x import dataloader, model, optimizer, train  # noqa: F401

# 36 epochs of 7,330 iterations (117,266 images, 16 an iteration); rate x0.1 after 24 and 33.
train.max_iter = 36 * ITERATIONS_PER_EPOCH
train.output_dir = "output/stageinteractor_r50_300q_crop_3x"
