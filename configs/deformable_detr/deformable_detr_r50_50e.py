"""Deformable DETR, ResNet-50, 300 queries, 50 epochs: 44.5 AP in MMDetection's report.

32 images per step: 118,287 images (with those without objects) are 3,697 iterations per epoch.
"""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from detection_toolkit.training.param_groups import params_with_decay_exceptions

from ..common.data.coco_crop import dataloader
from ..common.label_assigners import compared as _compared
from ..common.models.deformable_detr_r50 import model
from ..common.optim import optimizer
from ..common.train import train

dataloader.train.dataset.filter_empty = False
dataloader.train.total_batch_size = 32
# The short side before a crop is 400, 500 or 600 pixels, however long the other.
dataloader.train.mapper.augmentations[1].tfm_or_aug.augs[0].max_size = 4200
dataloader.stage_evaluator.label_assigners = _compared

optimizer.lr = 2e-4
optimizer.params = L(params_with_decay_exceptions)(
    base_lr="${..lr}",
    lr_factors={
        r"^backbone\.bottom_up\.": 0.1,
        r"\.sampling_offsets\.": 0.1,
        r"\.reference_points\.": 0.1,
    },
)
lr_multiplier = L(MultiStepParamScheduler)(
    values=[1.0, 0.1], milestones=[40 * 3697], num_updates=50 * 3697
)

train.output_dir = "./output/deformable_detr_r50_50e"
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.max_iter = 50 * 3697
train.eval_period = 3697
train.checkpointer.period = 3697
train.clip_grad.max_norm = 0.1
