"""HPR on DINO with Swin-L and four levels from stride 4 on, none of them additional."""

from deformable_detr import LevelMapper

from .dino_5scale_swin_l import model as _swin
from .hpr_dino_r50 import model

model.backbone._target_ = LevelMapper
model.backbone.bottom_up = _swin.backbone.bottom_up
model.backbone.in_features = ["p0", "p1", "p2", "p3"]
model.backbone.bias = True
# The maps have strides 4 to 32. Released models divide boxes by these strides all the same, and so
# look at boxes half as far from the corner and half as large. null: the strides of the maps.
model.decoder.roi_strides = [8, 16, 32, 64]
