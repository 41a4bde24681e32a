"""A tiny HPR on DDQ on the built-in shapes, on two CPU cores."""

from ..common.models.hpr_ddq_tiny import model
from ..stageinteractor.shapes_tiny import dataloader, lr_multiplier, optimizer, train

model.num_classes = 6
train.output_dir = "./output/hpr_ddq_shapes_tiny"
