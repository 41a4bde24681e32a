"""A tiny HPR on your own data: the recipe of stageinteractor_tiny_custom.py."""

from ..common.models.hpr_tiny import model
from ..stageinteractor.stageinteractor_tiny_custom import (  # noqa: F401
    dataloader,
    lr_multiplier,
    optimizer,
    recipe,
    train,
)

model.initial_queries.num_queries = 60
model.denoising.budget = 50
train.output_dir = "./output/hpr_tiny_custom"
