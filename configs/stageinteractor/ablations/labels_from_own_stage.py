"""The IoU test on the own match alone: no stage listens to another."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.criterion.label_assigner.stage_offsets = [[]] * 6
train.output_dir = "output/ablations/labels_from_own_stage"
