"""HPR on DDQ-DETR with ResNet-50, four levels and 300 queries, as released."""

from hpr import HPRDDQ, HybridDDQCriterion, HybridDDQDecoder

from .ddq_r50 import model
from .hpr_dino_r50 import model as _on_dino

model._target_ = HPRDDQ
_choice = dict(iou_threshold=0.8, first_keeps_all=True)
model.decoder = _on_dino.decoder
model.decoder._target_ = HybridDDQDecoder
# The released code draws the merge weights here, as it does matrices. [1, 1, 1]: as elsewhere.
model.decoder.update(merge_start=None, **_choice)
model.criterion._target_ = HybridDDQCriterion
model.criterion.auxiliary = dict(regional=0.5, dynamic=0.5)
