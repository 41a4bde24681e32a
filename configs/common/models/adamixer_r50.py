"""AdaMixer with ResNet-50 and 100 queries, as released."""

from detectron2.config import LazyCall as L

from adamixer import AdaMixerDecoder
from detection_toolkit.training import StagewiseMatcher

from .stageinteractor_r50 import model

model.decoder = L(AdaMixerDecoder)(
    num_classes="${..num_classes}",
    num_stages=6,
    channels="${..backbone.out_channels}",
    num_heads=8,
    ffn_channels=2048,
    groups=4,
    points=32,
    out_points=128,
    execution="${..execution}",
)
model.criterion.label_assigner = L(StagewiseMatcher)()
