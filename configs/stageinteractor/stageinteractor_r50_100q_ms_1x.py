"""ResNet-50, 100 queries, multi-scale training, 12 epochs."""

from ..common.data.coco_multiscale import dataloader  # noqa: F401
from .stageinteractor_r50_100q_1x import lr_multiplier, model, optimizer, train  # noqa: F401

train.output_dir = "output/stageinteractor_r50_100q_ms_1x"
