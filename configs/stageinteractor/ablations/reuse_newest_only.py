"""Channel filters of the stage before only, instead of all earlier ones from stage 1 on."""

from ..stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.channel_reuse_cap = 1
train.output_dir = "output/ablations/reuse_newest_only"
