"""The tiny model on the built-in shapes, from scratch on two CPU cores.

8,000 iterations x 16 images = 128,000 images, about 21 epochs of 6,000.
"""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

from ..common.data.shapes import dataloader
from ..common.models.stageinteractor_tiny import model
from ..common.optim import optimizer
from ..common.schedule import cosine_schedule
from ..common.train import train

lr_multiplier = cosine_schedule(warmup_share=0.1)

# Whatever the model is trained with: its variants are compared by it.
dataloader.stage_evaluator.label_assigners = [L(CrossStageMatcher)()]

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
