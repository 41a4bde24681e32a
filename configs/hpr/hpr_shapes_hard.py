"""The tiny HPR on the hard shapes: the recipe of stageinteractor/shapes_hard.py."""

from ..common.models.hpr_tiny import model
from ..stageinteractor.shapes_hard import dataloader, lr_multiplier, optimizer, train

model.num_classes = 6
model.initial_queries.num_queries = 30  # an image has up to 18 objects
model.max_detections = 30
train.output_dir = "./output/hpr_shapes_hard"
