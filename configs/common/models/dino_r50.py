"""DINO with ResNet-50, four levels and 900 queries, as in the authors' code."""

from detectron2.config import LazyCall as L

from detection_toolkit.training import Criterion, LabelNormalizer
from dino import (
    DINO,
    ContrastiveDenoising,
    DenoisingCriterion,
    DINODecoder,
    FocalCost,
    MixedQueries,
)

from .deformable_detr_r50 import criterion as _criterion
from .deformable_detr_r50 import model


def criterion():
    """The losses of the stages, of the proposals, or of denoising."""
    losses = _criterion(Criterion, num_classes="${...num_classes}")
    losses.class_weight = 1.0
    losses.matcher.class_cost = L(FocalCost)(eps=1e-8)
    # The same as MatchNormalizer, unless a label assigner gives other labels than the matches'.
    losses.normalizer = L(LabelNormalizer)()
    return losses


model._target_ = DINO
model.backbone.bias = True
model.encoder.update(ffn_channels=2048, dropout=0.0, position_temperature=20, position_offset=0.0)
model.decoder._target_ = DINODecoder
model.decoder.update(ffn_channels=2048, dropout=0.0, shared_head=True, prediction_eps=1e-3)
model.initial_queries._target_ = MixedQueries
model.initial_queries.update(num_queries=900, num_classes="${..num_classes}")
model.denoising = L(ContrastiveDenoising)(
    num_classes="${..num_classes}",
    channels="${..backbone.out_channels}",
    budget=100,
    label_noise=0.25,  # dn_label_noise_ratio=0.5 of the authors, who take half of it
    box_noise=1.0,
)
model.criterion = L(DenoisingCriterion)(
    main=criterion(), encoder=criterion(), denoising=criterion()
)
model.max_detections = 300
