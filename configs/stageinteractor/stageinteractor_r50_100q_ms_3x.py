"""ResNet-50, 100 queries, multi-scale training, 36 epochs."""

from .stageinteractor_r50_100q_ms_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

# 36 epochs of 7,330 iterations (117,266 images, 16 an iteration); rate x0.1 after 27 and 33.
train.max_iter = 36 * 7330
lr_multiplier.scheduler.milestones = [27 * 7330, 33 * 7330]
train.output_dir = "output/stageinteractor_r50_100q_ms_3x"
