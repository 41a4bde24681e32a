"""Backbones of the released configurations that Detectron2 lacks, and an adapter for timm's."""

from .deform_resnet import DeformBottleneckBlock, OffsetDeformConv2d
from .swin import SwinBackbone
from .timm_backbone import EfficientNetLite0, TimmBackbone

__all__ = [
    "DeformBottleneckBlock",
    "EfficientNetLite0",
    "OffsetDeformConv2d",
    "SwinBackbone",
    "TimmBackbone",
]
