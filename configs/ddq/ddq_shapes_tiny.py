"""A tiny DDQ-DETR on the built-in shapes, on two CPU cores."""

from ..common.models.ddq_tiny import model
from ..stageinteractor.shapes_tiny import dataloader, lr_multiplier, optimizer, train

model.num_classes = 6
train.output_dir = "./output/ddq_shapes_tiny"
