"""Neither filter reuse nor cross-stage labels: 42.6 AP published."""

from detectron2.config import LazyCall as L

from detection_toolkit.training import StagewiseMatcher

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.criterion.label_assigner = L(StagewiseMatcher)()
model.decoder.channel_reuse_cap = 0
model.decoder.spatial_reuse = False
train.output_dir = "output/ablations/no_reuse_no_cross_stage_labels"
