"""DN-Deformable-DETR with ResNet-50 and 300 queries, as in the authors' code."""

from detectron2.config import LazyCall as L

from dino import (
    AnchorQueries,
    BoxDenoising,
    DenoisingCriterion,
    DNDeformableDecoder,
    DNDeformableDETR,
    PositiveFocalLoss,
)

from .deformable_detr_r50 import model
from .dino_r50 import criterion as _criterion

model._target_ = DNDeformableDETR
model.backbone.bias = True
model.encoder.update(ffn_channels=2048, dropout=0.0)
model.decoder._target_ = DNDeformableDecoder
model.decoder.update(ffn_channels=2048, dropout=0.0)
model.initial_queries._target_ = AnchorQueries
model.denoising = L(BoxDenoising)(
    num_classes="${..num_classes}",
    channels="${..backbone.out_channels}",
    num_groups=5,
    label_noise=0.2,
    box_noise=0.4,
)
model.criterion = L(DenoisingCriterion)(main=_criterion(), denoising=_criterion())
model.criterion.denoising.class_loss = L(PositiveFocalLoss)()
