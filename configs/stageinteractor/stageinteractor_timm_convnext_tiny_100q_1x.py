"""Any timm backbone: ConvNeXt-T as an example. Needs the extra "timm"."""

from detectron2.config import LazyCall as L

from detection_toolkit.modeling.backbones import TimmBackbone

from .stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(TimmBackbone)(
    name="convnext_tiny.fb_in1k",
    pretrained=True,
    model_args=dict(drop_path_rate=0.2),
)
train.init_checkpoint = ""  # timm fetches the weights
train.output_dir = "output/stageinteractor_timm_convnext_tiny_100q_1x"
