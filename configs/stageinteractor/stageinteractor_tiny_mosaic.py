"""The tiny model on a data set of your own, with mosaic and mixup: stageinteractor_tiny_custom.py.

The last tenth of the run has the images by themselves.
"""

from ..common.data.mosaic import use_mosaic
from .stageinteractor_tiny_custom import dataloader, lr_multiplier, model, optimizer, recipe, train

use_mosaic(dataloader, mosaic=1.0, mixup=0.1)

train.output_dir = "./output/tiny_mosaic"
train.mix_until = 0.9
