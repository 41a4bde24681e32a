"""StageInteractor R50, 100 queries, 12 epochs: 44.8 AP on COCO val in the paper.

12 epochs x 7,330 iterations of 16 images = 87,960; drops after epochs 8 and 11.
"""

from ..common.data.coco_opencv import dataloader
from ..common.label_assigners import compared as _compared
from ..common.models.stageinteractor_r50 import model
from ..common.optim import optimizer
from ..common.schedule import schedule_1x as lr_multiplier
from ..common.train import train

dataloader.stage_evaluator.label_assigners = _compared

train.output_dir = "./output/stageinteractor_r50_100q_1x"
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.max_iter = 87960
train.eval_period = 7330
train.checkpointer.period = 7330
