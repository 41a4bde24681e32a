"""A query takes a gathered label from IoU 0.7 on instead of 0.5."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.criterion.label_assigner.iou_threshold = 0.7
train.output_dir = "output/ablations/iou_threshold_70"
