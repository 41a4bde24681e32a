"""The tiny detector, from its shapes checkpoint to ``shapes_shifted``: new looks, one new class.

Start it with train.init_checkpoint=checkpoints/shapes_tiny.pth.
"""

from ..common.schedule import cosine_schedule
from .shapes_tiny import dataloader, model, optimizer, train

model.num_classes = 7

dataloader.train.dataset.names = "shapes_shifted_train"
dataloader.test.dataset.names = "shapes_shifted_val"

lr_multiplier = cosine_schedule(warmup_share=0.05)
optimizer.lr = 4e-4

train.output_dir = "./output/shapes_tiny_finetune"
train.max_iter = 1000
train.eval_period = 250
train.checkpointer.period = 500
train.log_period = 20
train.ema.decay = 0.99  # of a run this short, an average over its last tenth
# As the stored results of `make demo` and of the bfloat16 plan were made: all rows of classes anew.
train.keep_known_classes = False
train.ema.warmup = False
train.ema.compare = False
