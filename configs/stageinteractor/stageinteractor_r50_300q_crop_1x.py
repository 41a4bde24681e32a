"""ResNet-50, 300 queries, multi-scale and crop augmentation, 12 epochs: 46.3 AP published."""

from ..common.data.coco_crop import dataloader
from ..common.label_assigners import compared as _compared
from .stageinteractor_r50_100q_1x import lr_multiplier, model, optimizer, train  # noqa: F401

dataloader.stage_evaluator.label_assigners = _compared
model.initial_queries.num_queries = 300
train.output_dir = "output/stageinteractor_r50_300q_crop_1x"
