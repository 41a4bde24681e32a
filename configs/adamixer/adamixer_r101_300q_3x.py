"""AdaMixer, ResNet-101, 300 queries, 36 epochs: 48.0 AP published."""

from .adamixer_r50_300q_3x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "output/adamixer_r101_300q_3x"
