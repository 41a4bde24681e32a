"""DINO with any timm backbone: ConvNeXt-T as an example. Needs the extra "timm"."""

from detectron2.config import LazyCall as L

from detection_toolkit.modeling.backbones import TimmBackbone

from .dino_r50_4scale_12e import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(TimmBackbone)(
    name="convnext_tiny.fb_in1k",
    pretrained=True,
    model_args=dict(drop_path_rate=0.2),
)
train.init_checkpoint = ""  # timm fetches the weights
train.output_dir = "./output/dino_timm_convnext_tiny_4scale_12e"
