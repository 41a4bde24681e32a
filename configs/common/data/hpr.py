"""COCO for HPR: the one place where the training recipe of its images is put in.

Released models see each image twice, as it comes from the usual augmentation and once more with
colours, geometry and patches changed, or are trained with large-scale jitter and copy-paste. Here
both are the usual augmentation of DETRs.
"""

import copy

from ..label_assigners import compared as _compared
from .coco_crop import dataloader

dataloader.train.dataset.filter_empty = True
# The short side before a crop is 400, 500 or 600 pixels, however long the other.
dataloader.train.mapper.augmentations[1].tfm_or_aug.augs[0].max_size = 4200
dataloader.stage_evaluator.label_assigners = _compared

large_scale_jitter = copy.deepcopy(dataloader)
large_scale_jitter.train.dataset.filter_empty = False
