"""Cross-stage labels only: 44.1 AP published."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.channel_reuse_cap = 0
model.decoder.spatial_reuse = False
train.output_dir = "output/ablations/no_filter_reuse"
