"""The static mixing of each reused filter stays, the filter itself is left out."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.apply_reused_channel_filters = False
train.output_dir = "output/ablations/static_mixing_only"
