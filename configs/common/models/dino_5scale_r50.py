"""DINO with ResNet-50 and five levels, from stride 4 on."""

from .dino_r50 import model

_maps = ["res2", "res3", "res4", "res5"]
model.backbone.bottom_up.out_features = _maps
model.backbone.in_features = _maps
model.encoder.num_levels = 5
model.decoder.num_levels = 5
