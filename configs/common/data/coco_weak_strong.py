"""COCO, every image twice: cropped and resized, and a strongly augmented copy of that."""

from detectron2.config import LazyCall as L
from detectron2.data.transforms import AugmentationList, RandomApply, RandomCrop, RandomFlip

from detection_toolkit.data import (
    InRandomOrder,
    RandomColorOperation,
    RandomErasing,
    RandomGeometricOperation,
    WeakStrongMapper,
)
from detection_toolkit.data.transforms import OpenCVResizeShortestEdge

from .coco_opencv import dataloader

# Height and width of the crop are independent, each uniform in [min(side, 384), min(side, 600)].
_crop = L(AugmentationList)(
    augs=[
        L(OpenCVResizeShortestEdge)(
            short_edge_length=[400, 500, 600], max_size=4200, sample_style="choice"
        ),
        L(RandomCrop)(crop_type="absolute_range", crop_size=[384, 600]),
    ]
)
dataloader.train.mapper = L(WeakStrongMapper)(
    augmentations=[
        L(RandomFlip)(prob=0.5),
        L(RandomApply)(tfm_or_aug=_crop, prob=0.5),
        L(OpenCVResizeShortestEdge)(
            short_edge_length=list(range(480, 801, 32)), max_size=1333, sample_style="choice"
        ),
    ],
    strong_augmentations=[
        L(InRandomOrder)(
            augs=[
                L(RandomColorOperation)(image_format="${.....image_format}"),
                L(RandomGeometricOperation)(),
            ]
        ),
        L(RandomErasing)(),
    ],
    image_format="RGB",
    copy_paste=None,
    recompute_boxes=False,
)
dataloader.train.aspect_ratio_grouping = True
