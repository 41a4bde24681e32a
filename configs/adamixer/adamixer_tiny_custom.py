"""A tiny AdaMixer on a data set of your own: the recipe of stageinteractor_tiny_custom.py."""

from ..common.models.adamixer_tiny import model
from ..stageinteractor.stageinteractor_tiny_custom import (  # noqa: F401
    dataloader,
    lr_multiplier,
    optimizer,
    recipe,
    train,
)

model.initial_queries.num_queries = 60
train.output_dir = "./output/adamixer_tiny_custom"
