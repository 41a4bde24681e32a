"""ResNet-101, 100 queries, multi-scale training, 12 epochs."""

from .stageinteractor_r50_100q_ms_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "output/stageinteractor_r101_100q_ms_1x"
