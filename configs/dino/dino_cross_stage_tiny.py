"""The tiny DINO with cross-stage labels on the built-in shapes."""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

from .dino_shapes_tiny import dataloader, lr_multiplier, model, optimizer, train

model.criterion.main.label_assigner = L(CrossStageMatcher)()
train.output_dir = "./output/dino_cross_stage_tiny"
