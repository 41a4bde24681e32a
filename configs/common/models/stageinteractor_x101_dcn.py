"""StageInteractor with ResNeXt-101 32x4d, deformable convolution v1 in res3 to res5."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet

from detection_toolkit.modeling import FrozenStatsBatchNorm2d
from detection_toolkit.modeling.backbones import DeformBottleneckBlock

from .stageinteractor_r50 import model


def _stage(block, num_blocks, first_stride, in_channels, bottleneck_channels):
    return L(ResNet.make_stage)(
        block_class=block,
        num_blocks=num_blocks,
        stride_per_block=[first_stride] + [1] * (num_blocks - 1),
        in_channels=in_channels,
        bottleneck_channels=bottleneck_channels,
        out_channels=2 * bottleneck_channels,
        num_groups=32,
        norm=FrozenStatsBatchNorm2d,
        stride_in_1x1=False,
    )


model.backbone.bottom_up.stages = [
    _stage(BottleneckBlock, 3, 1, 64, 128),
    _stage(DeformBottleneckBlock, 4, 2, 256, 256),
    _stage(DeformBottleneckBlock, 23, 2, 512, 512),
    _stage(DeformBottleneckBlock, 3, 2, 1024, 1024),
]
