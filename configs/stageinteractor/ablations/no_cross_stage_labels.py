"""Filter reuse only: 43.0 AP published."""

from detectron2.config import LazyCall as L

from detection_toolkit.training import StagewiseMatcher

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.criterion.label_assigner = L(StagewiseMatcher)()
train.output_dir = "output/ablations/no_cross_stage_labels"
