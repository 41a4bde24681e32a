"""DINO with ResNet-50 as MMDetection 3 computes it: a head for each stage, no bias in the neck."""

from .dino_r50 import model

model.backbone.bias = False
model.decoder.update(shared_head=False, prediction_eps=1e-5)
for _losses in (model.criterion.main, model.criterion.encoder, model.criterion.denoising):
    _losses.matcher.class_cost.eps = 1e-12
