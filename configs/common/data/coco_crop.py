"""COCO with the augmentation of the 300-query models: half of the images are cropped first."""

from detectron2.config import LazyCall as L
from detectron2.data.transforms import AugmentationList, RandomApply, RandomCrop, RandomFlip

from detection_toolkit.data.transforms import OpenCVResizeShortestEdge

from .coco_opencv import dataloader

# Height and width of the crop are independent, each uniform in [min(side, 384), min(side, 600)].
_crop = L(AugmentationList)(
    augs=[
        L(OpenCVResizeShortestEdge)(
            short_edge_length=[400, 500, 600], max_size=1333, sample_style="choice"
        ),
        L(RandomCrop)(crop_type="absolute_range", crop_size=[384, 600]),
    ]
)
dataloader.train.mapper.augmentations = [
    L(RandomFlip)(prob=0.5),
    L(RandomApply)(tfm_or_aug=_crop, prob=0.5),
    L(OpenCVResizeShortestEdge)(
        short_edge_length=list(range(480, 801, 32)), max_size=1333, sample_style="choice"
    ),
]
