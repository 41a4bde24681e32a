"""The tiny model on a data set of your own, on two CPU cores.

Name the data on the command line, as README shows. The numbers here suit a few hundred images;
size of the images, queries, steps and periods follow the training set, unless you set them, here or
on the command line. With train.init_checkpoint=checkpoints/shapes_tiny.pth the run begins from the
shapes.
"""

from detectron2.config import LazyCall as L
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge

from detection_toolkit.engine.recipe import SizeRecipe

from ..common.data.coco import dataloader
from ..common.label_assigners import compared as _compared
from ..common.models.stageinteractor_tiny import model
from ..common.optim import optimizer
from ..common.schedule import cosine_schedule
from ..common.train import train

dataloader.train.dataset.names = None
dataloader.train.dataset.filter_empty = False
dataloader.train.mapper.augmentations = [
    L(ResizeShortestEdge)(
        short_edge_length=[200, 224, 240, 256, 280], max_size=480, sample_style="choice"
    ),
    L(RandomFlip)(prob=0.5, horizontal=True, vertical=False),
]
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 2
dataloader.test.dataset.names = None
dataloader.test.mapper.augmentations = [L(ResizeShortestEdge)(short_edge_length=240, max_size=480)]
dataloader.test.num_workers = 2
dataloader.stage_evaluator.label_assigners = _compared

model.initial_queries.num_queries = 60
optimizer.lr = 4e-4
lr_multiplier = cosine_schedule(warmup_share=0.1)

train.output_dir = "./output/tiny_custom"
train.max_iter = 2500
train.seed = 1
train.eval_period = 500
train.checkpointer.period = 500
train.checkpointer.max_to_keep = 2
train.ema.enabled = True
train.ema.decay = 0.998

# These values, where nothing else is set, are replaced by what suits the training set.
recipe = L(SizeRecipe)(image_size=240, num_queries=60, max_iter=2500)
