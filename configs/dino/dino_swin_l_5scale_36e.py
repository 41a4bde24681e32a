"""DINO, Swin-L, five levels, 36 epochs: 56.8 to 58.5 AP published, by schedule and levels."""

from ..common.models.dino_5scale_swin_l import model
from .dino_r50_4scale_36e import dataloader, lr_multiplier, optimizer, train

# ImageNet-22k, 384 pixels.
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_large_patch4_window12_384_22k.pth"
)
train.output_dir = "./output/dino_swin_l_5scale_36e"
