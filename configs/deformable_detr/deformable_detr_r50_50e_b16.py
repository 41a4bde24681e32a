"""Deformable DETR, ResNet-50, 50 epochs at 16 images per step, half the released batch and rate.

118,287 images are 7,393 iterations an epoch.
"""

from .deformable_detr_r50_50e import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

dataloader.train.total_batch_size = 16
optimizer.lr = 1e-4
lr_multiplier.milestones = [40 * 7393]
lr_multiplier.num_updates = 50 * 7393
train.output_dir = "./output/deformable_detr_r50_50e_b16"
train.max_iter = 50 * 7393
train.eval_period = 7393
train.checkpointer.period = 7393
