"""What detectors are built from: the meta-architecture's base, cascade, sampling, backbones."""

from .backbone import FrozenStatsBatchNorm2d, PlainConvNet
from .decoder import QUERY_HEADS, CascadeDecoder, Route
from .detector import QueryDetector, require_query_detector
from .execution import Execution
from .feature_maps import FeatureMaps
from .neck import SharedNormChannelMapper
from .sampling_module import PointSampler, SampledPoints, SamplingModule

__all__ = [
    "QUERY_HEADS",
    "CascadeDecoder",
    "Execution",
    "FeatureMaps",
    "FrozenStatsBatchNorm2d",
    "PlainConvNet",
    "PointSampler",
    "QueryDetector",
    "Route",
    "SampledPoints",
    "SamplingModule",
    "SharedNormChannelMapper",
    "require_query_detector",
]
