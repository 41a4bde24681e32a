"""Stage t listens to stages t - 1, t and t + 1."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.criterion.label_assigner.stage_offsets = [[-1, 1]] * 6
train.output_dir = "output/ablations/labels_from_neighbours"
