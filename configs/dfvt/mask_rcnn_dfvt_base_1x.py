"""Mask R-CNN with DFvT-B, 12 epochs: 43.4 box AP and 39.0 mask AP in the paper, with soft-NMS."""

from dfvt import VARIANTS

from .mask_rcnn_dfvt_tiny_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(VARIANTS["base"])
model.roi_heads.box_predictor.soft_nms = True
train.output_dir = "output/mask_rcnn_dfvt_base_1x"
