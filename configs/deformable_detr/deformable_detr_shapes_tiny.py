"""A tiny Deformable DETR with box refinement on the built-in shapes, on two CPU cores."""

from ..common.models.deformable_detr_tiny import model
from ..stageinteractor.shapes_tiny import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.num_classes = 6
train.output_dir = "./output/deformable_detr_shapes_tiny"
