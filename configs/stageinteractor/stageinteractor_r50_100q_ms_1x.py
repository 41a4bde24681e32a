"""ResNet-50, 100 queries, multi-scale training, 12 epochs."""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

from ..common.data.coco_multiscale import dataloader
from .stageinteractor_r50_100q_1x import lr_multiplier, model, optimizer, train  # noqa: F401

# Whatever the model is trained with: its variants are compared by it.
dataloader.stage_evaluator.label_assigners = [L(CrossStageMatcher)()]
train.output_dir = "output/stageinteractor_r50_100q_ms_1x"
