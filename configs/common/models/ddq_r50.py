"""DDQ-DETR with ResNet-50, four levels and 300 queries, as MMDetection 3 computes it."""

from detectron2.config import LazyCall as L

from ddq import (
    DDQ,
    DDQCriterion,
    DDQDecoder,
    DenseCriterion,
    DistinctQueries,
    TwiceSquashedCost,
)
from detection_toolkit.structures.boxes import cxcywh_norm, xyxy_norm
from detection_toolkit.training import HungarianMatcher, MatchNormalizer, StagewiseMatcher

from .dino_mmdet_r50 import model


def dense_criterion():
    """The losses of the dense queries, or of their proposals."""
    return L(DenseCriterion)(
        num_classes="${...num_classes}",
        matcher=L(HungarianMatcher)(
            class_weight=2.0,
            l1_weight=5.0,
            giou_weight=2.0,
            class_cost=L(TwiceSquashedCost)(),
            box_code=xyxy_norm,
            repeats=4,
        ),
        label_assigner=L(StagewiseMatcher)(),
        class_weight=1.0,
        giou_weight=2.0,
        box_code=cxcywh_norm,
        giou_eps=1e-7,
    )


model._target_ = DDQ
model.decoder._target_ = DDQDecoder
del model.decoder.shared_head
model.decoder.update(iou_threshold=0.8, first_keeps_all=True)
model.initial_queries._target_ = DistinctQueries
model.initial_queries.update(num_queries=300, dense_ratio=1.5, iou_threshold=0.8)
for _losses in (model.criterion.main, model.criterion.encoder, model.criterion.denoising):
    _losses.normalizer = L(MatchNormalizer)()
model.criterion._target_ = DDQCriterion
model.criterion.update(dense=dense_criterion(), dense_encoder=dense_criterion())
