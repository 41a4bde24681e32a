"""DFvT, the doubly-fused ViT (Gao et al., ECCV 2022), as a Detectron2 backbone."""

from . import checkpoint  # noqa: F401  (lets checkpointers take official weights)
from .backbone import DFvTBackbone, add_dfvt_config
from .classifier import DFvTClassifier
from .data import RandomPolygonCrop, get_instance_segmentation_dataset
from .param_groups import NO_WEIGHT_DECAY
from .soft_nms import SoftNMSFastRCNNOutputLayers, SoftNMSRPN
from .variants import VARIANTS

__all__ = [
    "NO_WEIGHT_DECAY",
    "VARIANTS",
    "DFvTBackbone",
    "DFvTClassifier",
    "RandomPolygonCrop",
    "SoftNMSFastRCNNOutputLayers",
    "SoftNMSRPN",
    "add_dfvt_config",
    "get_instance_segmentation_dataset",
]
