"""AdaMixer, ResNet-50, 100 queries, 12 epochs: 42.7 AP published."""

from ..common.data.coco_opencv import dataloader
from ..common.label_assigners import compared as _compared
from ..common.models.adamixer_r50 import model  # noqa: F401
from ..stageinteractor.stageinteractor_r50_100q_1x import (  # noqa: F401
    lr_multiplier,
    optimizer,
    train,
)

dataloader.stage_evaluator.label_assigners = _compared
train.output_dir = "output/adamixer_r50_100q_1x"
