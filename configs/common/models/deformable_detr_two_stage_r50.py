"""Deformable DETR with ResNet-50, whose 300 queries are the encoder's best proposals."""

from detectron2.config import LazyCall as L

from deformable_detr import ProposalCriterion, ProposedQueries, TwoStageCriterion
from detection_toolkit.training import Criterion

from .deformable_detr_r50 import criterion as _criterion
from .deformable_detr_refine_r50 import model

model.initial_queries._target_ = ProposedQueries
model.initial_queries.num_classes = "${..num_classes}"
model.decoder.first_size_logit = 0.0
model.criterion = L(TwoStageCriterion)(
    main=_criterion(Criterion, num_classes="${...num_classes}"),
    proposals=_criterion(ProposalCriterion, num_classes="${...num_classes}"),
)
