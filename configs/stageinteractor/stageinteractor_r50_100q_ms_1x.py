"""ResNet-50, 100 queries, multi-scale training, 12 epochs."""

from ..common.data.coco_multiscale import dataloader
from ..common.label_assigners import compared as _compared
from .stageinteractor_r50_100q_1x import lr_multiplier, model, optimizer, train  # noqa: F401

dataloader.stage_evaluator.label_assigners = _compared
train.output_dir = "output/stageinteractor_r50_100q_ms_1x"
