"""Only channel filters are reused."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.spatial_reuse = False
train.output_dir = "output/ablations/no_spatial_reuse"
