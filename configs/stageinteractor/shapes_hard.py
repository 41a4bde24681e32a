"""The tiny model on the hard shapes, crowded, overlapping and small, from scratch on one CPU core.

The base of the ablation in docs/results.md, which says how the number of iterations was chosen.
8 images per step, of 2,000.
"""

from ..common.schedule import cosine_schedule
from .shapes_tiny import dataloader, model, optimizer, train

model.initial_queries.num_queries = 30  # an image has up to 18 objects

dataloader.train.dataset.names = "shapes_hard_train"
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0  # all on one core
dataloader.test.dataset.names = "shapes_hard_val"
dataloader.test.batch_size = 8
dataloader.test.num_workers = 0

lr_multiplier = cosine_schedule(warmup_share=0.1)
optimizer.lr = 5e-4

train.output_dir = "./output/shapes_hard"
train.max_iter = 1500
train.eval_period = 150
train.checkpointer.period = 250
train.log_period = 10
train.ema.decay = 0.99
# As the stored results of the ablation were made: the average of the last weights, from the start.
train.ema.warmup = False
train.ema.compare = False
train.best_checkpointer.enabled = False  # the last weights count
