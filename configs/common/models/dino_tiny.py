"""A DINO small enough to train on two CPU cores, with a head for each stage."""

from detectron2.config import LazyCall as L

from detection_toolkit.modeling import PlainConvNet

from .dino_r50 import model

model.num_classes = 6
model.backbone.bottom_up = L(PlainConvNet)(widths=[32, 64, 96, 96])
model.backbone.out_channels = 64
model.backbone.norm_groups = 8
model.initial_queries.num_queries = 20
model.encoder.update(num_layers=2, num_heads=4, ffn_channels=128)
model.decoder.update(num_stages=4, num_heads=4, ffn_channels=128, shared_head=False)
model.denoising.budget = 20
model.max_detections = 20
