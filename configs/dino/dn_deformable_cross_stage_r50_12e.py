"""DN-Deformable-DETR with cross-stage labels, ResNet-50, 12 epochs: no published figure."""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

from .dn_deformable_r50_12e import dataloader, lr_multiplier, model, optimizer, train

model.criterion.main.label_assigner = L(CrossStageMatcher)()
train.output_dir = "./output/dn_deformable_cross_stage_r50_12e"
