"""Only spatial filters are reused."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.channel_reuse_cap = 0
train.output_dir = "output/ablations/no_channel_reuse"
