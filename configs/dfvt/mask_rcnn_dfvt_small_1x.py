"""Mask R-CNN with DFvT-S, 12 epochs: 39.2 box AP and 36.3 mask AP in the paper."""

from dfvt import VARIANTS

from .mask_rcnn_dfvt_tiny_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(VARIANTS["small"])
train.output_dir = "output/mask_rcnn_dfvt_small_1x"
