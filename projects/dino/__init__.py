"""DINO (Zhang et al., ICLR 2023), and DN-Deformable-DETR (Li et al., CVPR 2022) before it."""

from . import official_names  # noqa: F401  (registers the formats of official weights)
from .criterion import DenoisingCriterion, FocalCost, PositiveFocalLoss
from .decoder import DINODecoder, DNDeformableDecoder
from .denoising import BoxDenoising, ContrastiveDenoising, Denoising
from .detector import DINO, DNDeformableDETR
from .queries import AnchorQueries, MixedQueries

__all__ = [
    "AnchorQueries",
    "BoxDenoising",
    "ContrastiveDenoising",
    "DINO",
    "DINODecoder",
    "DNDeformableDETR",
    "DNDeformableDecoder",
    "Denoising",
    "DenoisingCriterion",
    "FocalCost",
    "MixedQueries",
    "PositiveFocalLoss",
]
