"""Deformable DETR with ResNet-50 and 300 queries, each stage refining the boxes before it."""

from deformable_detr import RefiningDeformableDETRDecoder

from .deformable_detr_r50 import model

model.decoder._target_ = RefiningDeformableDETRDecoder
