"""AdaMixer, ResNet-50, 100 queries, 12 epochs: 42.7 AP published."""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

from ..common.data.coco_opencv import dataloader
from ..common.models.adamixer_r50 import model  # noqa: F401
from ..stageinteractor.stageinteractor_r50_100q_1x import (  # noqa: F401
    lr_multiplier,
    optimizer,
    train,
)

# Whatever the model is trained with: its variants are compared by it.
dataloader.stage_evaluator.label_assigners = [L(CrossStageMatcher)()]
train.output_dir = "output/adamixer_r50_100q_1x"
