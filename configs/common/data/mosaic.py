"""Mosaic and mixup, for the data of any config."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from detection_toolkit.data import MixUp, Mosaic, MultiImageMapper


def use_mosaic(dataloader: DictConfig, *, mosaic: float = 1.0, mixup: float = 0.1) -> None:
    """Let training images be made of several.

    Args:
        dataloader: changed in place.
        mosaic: share of the images that are a mosaic.
        mixup: share of the images that another one shines through.
    """
    single = dataloader.train.mapper
    dataloader.train.mapper = L(MultiImageMapper)(
        augmentations=single.augmentations,
        image_format=single.image_format,
        mosaic=L(Mosaic)(prob=mosaic, center=[0.25, 0.75], scale=[0.5, 1.0]),
        mixup=L(MixUp)(prob=mixup),
        copy_paste=None,
    )
