"""What detectors are built from: the meta-architecture's base, cascade, sampling, backbones."""

from .backbone import FrozenStatsBatchNorm2d, PlainConvNet
from .decoder import QUERY_HEADS, CascadeDecoder
from .detector import QueryDetector
from .execution import Execution
from .gathering import GatherableMaps
from .neck import SharedNormChannelMapper

__all__ = [
    "QUERY_HEADS",
    "CascadeDecoder",
    "Execution",
    "FrozenStatsBatchNorm2d",
    "GatherableMaps",
    "PlainConvNet",
    "QueryDetector",
    "SharedNormChannelMapper",
]
