"""A tiny AdaMixer on the built-in shapes, from scratch on two CPU cores."""

from ..common.models.adamixer_tiny import model
from ..stageinteractor.shapes_tiny import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.num_classes = 6
train.output_dir = "./output/adamixer_shapes_tiny"
