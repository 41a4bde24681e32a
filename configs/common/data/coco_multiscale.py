"""COCO, the short side in training one of 480, 512, ... 800 pixels."""

from .coco_opencv import dataloader

dataloader.train.mapper.augmentations[0].update(
    short_edge_length=list(range(480, 801, 32)), sample_style="choice"
)
