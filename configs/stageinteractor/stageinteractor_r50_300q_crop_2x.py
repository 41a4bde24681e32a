"""ResNet-50, 300 queries, multi-scale and crop augmentation, 24 epochs: 48.3 AP published."""

from ..common.schedule import ITERATIONS_PER_EPOCH
from ..common.schedule import schedule_crop_2x as lr_multiplier  # noqa: F401
from .stageinteractor_r50_300q_crop_1x import dataloader, model, optimizer, train  # noqa: F401

# 24 epochs of 7,330 iterations (117,266 images, 16 an iteration); rate x0.1 after 16 and 22.
train.max_iter = 24 * ITERATIONS_PER_EPOCH
train.output_dir = "output/stageinteractor_r50_300q_crop_2x"
