"""StageInteractor with Swin-S, window 7."""

from detectron2.config import LazyCall as L

from detection_toolkit.modeling.backbones import SwinBackbone

from .stageinteractor_r50 import model

model.backbone.bottom_up = L(SwinBackbone)(
    embed_dim=96,
    depths=[2, 2, 18, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    drop_path_rate=0.2,
)
model.backbone.in_features = ["p0", "p1", "p2", "p3"]
