"""DFvT, the doubly-fused ViT (Gao et al., ECCV 2022), as a Detectron2 backbone."""

from .backbone import DFvTBackbone
from .classifier import DFvTClassifier
from .variants import VARIANTS

__all__ = ["VARIANTS", "DFvTBackbone", "DFvTClassifier"]
