"""ResNet-50, 300 queries, multi-scale and crop augmentation, 36 epochs: 48.9 AP published."""

from .stageinteractor_r50_300q_crop_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

# 36 epochs of 7,330 iterations (117,266 images, 16 an iteration); rate x0.1 after 24 and 33.
train.max_iter = 36 * 7330
lr_multiplier.scheduler.milestones = [24 * 7330, 33 * 7330]
train.output_dir = "output/stageinteractor_r50_300q_crop_3x"
