"""The tiny detector, from its shapes checkpoint to ``shapes_shifted``: new looks, one new class."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from .shapes_tiny import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.num_classes = 7

dataloader.train.dataset.names = "shapes_shifted_train"
dataloader.test.dataset.names = "shapes_shifted_val"

optimizer.lr = 2e-4
lr_multiplier = L(WarmupParamScheduler)(  # noqa: F811
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=0.05,
    warmup_factor=0.1,
)

train.output_dir = "output/shapes_tiny_finetune"
train.max_iter = 1000
train.eval_period = 250
