"""DINO with cross-stage labels, Swin-L, five levels, 12 epochs: no published figure."""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

from .dino_swin_l_5scale_12e import dataloader, lr_multiplier, model, optimizer, train

model.criterion.main.label_assigner = L(CrossStageMatcher)()
train.output_dir = "./output/dino_cross_stage_swin_l_5scale_12e"
