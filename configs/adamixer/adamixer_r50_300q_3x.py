"""AdaMixer, ResNet-50, 300 queries, 36 epochs: 47.0 AP published."""

from ..common.models.adamixer_r50 import model
from ..stageinteractor.stageinteractor_r50_300q_crop_3x import (  # noqa: F401
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)

model.initial_queries.num_queries = 300
train.output_dir = "output/adamixer_r50_300q_3x"
