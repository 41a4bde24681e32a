"""Deformable DETR with cross-stage labels, ResNet-50, 50 epochs: no published figure."""

from detectron2.config import LazyCall as L

from detection_toolkit.training import LabelNormalizer
from stageinteractor import CrossStageMatcher

from .deformable_detr_r50_50e import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.criterion.label_assigner = L(CrossStageMatcher)()
model.criterion.normalizer = L(LabelNormalizer)()
train.output_dir = "./output/deformable_detr_cross_stage_r50_50e"
