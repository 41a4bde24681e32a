"""An AdaMixer of the size of the tiny StageInteractor."""

from detectron2.config import LazyCall as L

from adamixer import AdaMixerDecoder
from detection_toolkit.training import StagewiseMatcher

from .stageinteractor_tiny import model

model.decoder = L(AdaMixerDecoder)(
    num_classes="${..num_classes}",
    num_stages=4,
    channels="${..backbone.out_channels}",
    num_heads=4,
    ffn_channels=128,
    groups=4,
    points=16,
    out_points=32,
    execution="${..execution}",
)
model.criterion.label_assigner = L(StagewiseMatcher)()
