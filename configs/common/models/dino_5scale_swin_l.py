"""DINO with Swin-L and five levels."""

from detectron2.config import LazyCall as L

from detection_toolkit.modeling.backbones import SwinBackbone

from .dino_5scale_r50 import model

# Weights of the backbone, of 384 pixels.
IMAGENET_22K = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_large_patch4_window12_384_22k.pth"
)

model.backbone.bottom_up = L(SwinBackbone)(
    embed_dim=192,
    depths=[2, 2, 18, 2],
    num_heads=[6, 12, 24, 48],
    window_size=12,
    drop_path_rate=0.2,
    use_checkpoint=True,
)
model.backbone.in_features = ["p0", "p1", "p2", "p3"]
