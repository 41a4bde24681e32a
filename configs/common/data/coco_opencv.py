"""COCO at 800/1333 pixels, resized with OpenCV as the official weights were trained."""

from detectron2.config import LazyCall as L
from detectron2.data.transforms import RandomFlip

from detection_toolkit.data.transforms import OpenCVResizeShortestEdge

from .coco import dataloader

dataloader.train.mapper.augmentations = [
    L(OpenCVResizeShortestEdge)(short_edge_length=800, max_size=1333),
    L(RandomFlip)(prob=0.5),
]
dataloader.test.mapper.augmentations = [
    L(OpenCVResizeShortestEdge)(short_edge_length=800, max_size=1333),
]
