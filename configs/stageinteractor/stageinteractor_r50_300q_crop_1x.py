"""ResNet-50, 300 queries, multi-scale and crop augmentation, 12 epochs: 46.3 AP published."""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

from ..common.data.coco_crop import dataloader
from .stageinteractor_r50_100q_1x import lr_multiplier, model, optimizer, train  # noqa: F401

# Whatever the model is trained with: its variants are compared by it.
dataloader.stage_evaluator.label_assigners = [L(CrossStageMatcher)()]
model.initial_queries.num_queries = 300
train.output_dir = "output/stageinteractor_r50_300q_crop_1x"
