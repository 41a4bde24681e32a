"""Align-DETR (Cai et al., BMVC 2024): class labels that say how well a box fits.

The detector is DINO's; what is its own is how predictions are supervised.
"""

from .criterion import AlignedCriterion, AlignedLoss, RankedCriterion, repeats_of_stages
from .detector import AlignDETR

__all__ = ["AlignDETR", "AlignedCriterion", "AlignedLoss", "RankedCriterion", "repeats_of_stages"]
