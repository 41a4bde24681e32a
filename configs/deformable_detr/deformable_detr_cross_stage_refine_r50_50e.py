"""Deformable DETR with box refinement and cross-stage labels, 50 epochs: no published figure."""

from detectron2.config import LazyCall as L

from detection_toolkit.training import LabelNormalizer
from stageinteractor import CrossStageMatcher

from .deformable_detr_refine_r50_50e import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.criterion.label_assigner = L(CrossStageMatcher)()
model.criterion.normalizer = L(LabelNormalizer)()
train.output_dir = "./output/deformable_detr_cross_stage_refine_r50_50e"
