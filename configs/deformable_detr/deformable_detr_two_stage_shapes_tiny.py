"""A tiny two-stage Deformable DETR on the built-in shapes, on two CPU cores."""

from ..common.models.deformable_detr_tiny import make_tiny
from ..common.models.deformable_detr_two_stage_r50 import model
from ..stageinteractor.shapes_tiny import dataloader, lr_multiplier, optimizer, train  # noqa: F401

make_tiny(model)
train.output_dir = "./output/deformable_detr_two_stage_shapes_tiny"
