"""ResNet-101, 300 queries, multi-scale and crop augmentation, 36 epochs: 49.9 AP published."""

from .stageinteractor_r50_300q_crop_3x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "output/stageinteractor_r101_300q_3x"
