"""Channel filters of the two stages before only."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.channel_reuse_cap = 2
train.output_dir = "output/ablations/reuse_newest_two"
