"""DINO, Swin-L, five levels, 36 epochs: 56.8 to 58.5 AP published, by schedule and levels."""

from ..common.models.dino_5scale_swin_l import IMAGENET_22K as _IMAGENET_22K
from ..common.models.dino_5scale_swin_l import model
from .dino_r50_4scale_36e import dataloader, lr_multiplier, optimizer, train

train.init_checkpoint = _IMAGENET_22K
train.output_dir = "./output/dino_swin_l_5scale_36e"
