"""Deformable DETR, ResNet-50, 50 epochs at 16 images per step, half the released batch and rate."""

from ..common.schedule import ITERATIONS_PER_FULL_EPOCH as _EPOCH
from ..common.schedule import one_drop_schedule
from .deformable_detr_r50_50e import dataloader, model, optimizer, train  # noqa: F401

dataloader.train.total_batch_size = 16
optimizer.lr = 1e-4
lr_multiplier = one_drop_schedule(50, 40)
train.output_dir = "./output/deformable_detr_r50_50e_b16"
train.max_iter = 50 * _EPOCH
train.eval_period = _EPOCH
train.checkpointer.period = _EPOCH
