"""HPR on the improved Deformable DETR, which is DINO without denoising; ResNet-50, 900 queries."""

from .hpr_dino_r50 import model

model.denoising = None
model.criterion.denoising = None
