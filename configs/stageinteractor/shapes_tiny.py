"""The tiny model on the built-in shapes, from scratch on two CPU cores.

8,000 iterations x 16 images = 128,000 images, about 21 epochs of 6,000.
"""

from ..common.data.shapes import dataloader
from ..common.label_assigners import compared as _compared
from ..common.models.stageinteractor_tiny import model
from ..common.optim import optimizer
from ..common.schedule import cosine_schedule
from ..common.train import train

lr_multiplier = cosine_schedule(warmup_share=0.1)

dataloader.stage_evaluator.label_assigners = _compared

model.num_classes = 6
optimizer.lr = 7e-4

train.output_dir = "./output/shapes_tiny"
train.max_iter = 8000
train.seed = 1
train.eval_period = 2000
train.checkpointer.period = 1000
train.checkpointer.max_to_keep = 2
train.log_period = 50
train.ema.enabled = True
train.ema.decay = 0.998
