"""Reuse starts one stage later: the filter bank begins at stage 2."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.reuse_start = 3
train.output_dir = "output/ablations/reuse_from_stage_3"
