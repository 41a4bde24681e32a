"""An HPR small enough to train on two CPU cores."""

from .deformable_detr_tiny import make_tiny
from .hpr_dino_r50 import model

make_tiny(model)
model.denoising.budget = 20
model.decoder.update(inner_channels=16, finest_scale=28)
