"""The built-in shapes, every image twice: flipped, and a strongly augmented copy of that."""

from detectron2.config import LazyCall as L
from detectron2.data.transforms import RandomFlip

from .coco_weak_strong import dataloader

dataloader.train.dataset.names = "shapes_train"
dataloader.train.dataset.filter_empty = False
dataloader.train.mapper.augmentations = [L(RandomFlip)(prob=0.5)]
dataloader.train.num_workers = 2
dataloader.test.dataset.names = "shapes_val"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 2
