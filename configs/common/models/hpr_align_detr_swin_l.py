"""HPR on Align-DETR with Swin-L and four levels from stride 4 on, as released."""

from .hpr_align_detr_r50 import model
from .hpr_dino_swin_l import model as _on_dino

model.backbone = _on_dino.backbone
model.decoder.roi_strides = _on_dino.decoder.roi_strides
