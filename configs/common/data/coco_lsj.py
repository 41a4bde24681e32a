"""COCO with large-scale jitter and copy-paste at 1024 x 1024 pixels, every image twice."""

from detectron2.config import LazyCall as L
from detectron2.data.transforms import FixedSizeCrop, RandomCrop, RandomFlip

from detection_toolkit.data import CopyPaste
from detection_toolkit.data.transforms import OpenCVResizeScale, OpenCVResizeShortestEdge

from .coco_weak_strong import dataloader


def use_jitter(dataloader, side: int):
    """Images of side x side pixels, padded where they are smaller, as if padding were image."""
    pad = L(FixedSizeCrop)(crop_size=[side, side], pad=True, pad_value=114)
    dataloader.train.mapper.augmentations = [
        L(OpenCVResizeScale)(min_scale=0.1, max_scale=2.0, target_height=side, target_width=side),
        L(RandomCrop)(crop_type="absolute", crop_size=[side, side]),
        L(RandomFlip)(prob=0.5),
        pad,
    ]
    dataloader.train.mapper.copy_paste = L(CopyPaste)(max_objects=100)
    dataloader.train.mapper.recompute_boxes = True
    dataloader.train.dataset.filter_empty = False
    # All images have one size.
    dataloader.train.aspect_ratio_grouping = False
    dataloader.test.mapper.augmentations = [
        L(OpenCVResizeShortestEdge)(short_edge_length=side, max_size=side),
        pad,
    ]


use_jitter(dataloader, 1024)
