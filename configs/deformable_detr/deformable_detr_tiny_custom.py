"""A tiny Deformable DETR on your own data: the recipe of stageinteractor_tiny_custom.py."""

from ..common.models.deformable_detr_tiny import model
from ..stageinteractor.stageinteractor_tiny_custom import (  # noqa: F401
    dataloader,
    lr_multiplier,
    optimizer,
    recipe,
    train,
)

model.initial_queries.num_queries = 60
train.output_dir = "./output/deformable_detr_tiny_custom"
