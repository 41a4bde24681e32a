"""HPR, the Hybrid Proposal Refiner (Zhao et al., CVPR 2024), on DINO and Deformable DETR."""

from . import official_names, official_names_of_ddq  # noqa: F401  (register official weights)
from .criterion import HybridCriterion
from .ddq import HPRDDQ, HybridDDQCriterion, HybridDDQDecoder
from .decoder import HybridDecoder, SingleRefinerDecoder
from .detector import HPR
from .dynamic_convolution import DynamicConvolution
from .merge import ChannelMerge, FixedMerge, ScalarMerge
from .regional_attention import RegionalCrossAttention
from .roi import RoIFeatures
from .stage import HybridStage, Refiner
from .viewers import MergeWeights, RegionalAttention

__all__ = [
    "ChannelMerge",
    "DynamicConvolution",
    "FixedMerge",
    "HPR",
    "HPRDDQ",
    "HybridCriterion",
    "HybridDDQCriterion",
    "HybridDDQDecoder",
    "HybridDecoder",
    "HybridStage",
    "MergeWeights",
    "Refiner",
    "RegionalAttention",
    "RegionalCrossAttention",
    "RoIFeatures",
    "ScalarMerge",
    "SingleRefinerDecoder",
]
