"""HPR on Align-DETR with ResNet-50, four levels and 900 queries, as released."""

from hpr import HPR, HybridCriterion

from .align_detr_r50 import model
from .hpr_dino_r50 import model as _on_dino

model._target_ = HPR
model.decoder = _on_dino.decoder
model.criterion._target_ = HybridCriterion
model.criterion.auxiliary = dict(regional=0.5, dynamic=0.5)
