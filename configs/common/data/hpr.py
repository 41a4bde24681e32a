"""COCO as released HPR models saw it: each image as it comes from the usual augmentation and once
more with colours, geometry and patches changed, or with large-scale jitter."""

from ..label_assigners import compared as _compared
from .coco_lsj import dataloader as large_scale_jitter
from .coco_weak_strong import dataloader

for _loaders in (dataloader, large_scale_jitter):
    _loaders.stage_evaluator.label_assigners = _compared
