"""Align-DETR with ResNet-50, four levels and 900 queries, on DINO as MMDetection 3 computes it."""

from detectron2.config import LazyCall as L

from align_detr import AlignDETR, AlignedCriterion, RankedCriterion, repeats_of_stages
from detection_toolkit.training import MatchNormalizer

from .dino_mmdet_r50 import model

model._target_ = AlignDETR
model.backbone.bias = True
model.backbone.bottom_up.freeze_at = 1  # the stem
model.encoder.update(position_temperature=10000, position_offset=-0.5)

for _losses in (model.criterion.main, model.criterion.encoder, model.criterion.denoising):
    _losses._target_ = RankedCriterion
    _losses.update(alpha=0.25, gamma=2.0, tau=1.5, normalizer=L(MatchNormalizer)())
model.criterion.main.matcher.repeats = L(repeats_of_stages)(
    num_stages="${.....decoder.num_stages}", k=2
)
model.criterion.encoder.matcher.repeats = 2
model.criterion.denoising._target_ = AlignedCriterion
del model.criterion.denoising.tau
