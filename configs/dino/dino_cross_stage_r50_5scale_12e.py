"""DINO with cross-stage labels, ResNet-50, five levels, 12 epochs: no published figure."""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

from .dino_r50_5scale_12e import dataloader, lr_multiplier, model, optimizer, train

model.criterion.main.label_assigner = L(CrossStageMatcher)()
train.output_dir = "./output/dino_cross_stage_r50_5scale_12e"
