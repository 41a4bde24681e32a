"""DINO with ResNet-50 as detrex computes it: a head for each stage, other position codes."""

from .dino_r50 import model

model.backbone.bottom_up.freeze_at = 1  # the stem
model.decoder.shared_head = False
model.encoder.update(position_temperature=10000, position_offset=-0.5)
