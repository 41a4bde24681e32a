"""The detector: backbone helpers, neck, queries, decoder stages and the meta-architecture."""

from .attention import IoFBiasedSelfAttention
from .backbone import FrozenStatsBatchNorm2d, PlainConvNet
from .decoder import QUERY_HEADS, CascadeDecoder, StageInteractorDecoder
from .detector import StageInteractor
from .filter_bank import DynamicFilters, FilterBank
from .mixing import CascadeDynamicMixing
from .neck import SharedNormChannelMapper
from .queries import InitialQueries
from .sampling import SubBoxSampling
from .stage import DecoderStage

__all__ = [
    "QUERY_HEADS",
    "CascadeDecoder",
    "CascadeDynamicMixing",
    "DecoderStage",
    "DynamicFilters",
    "FilterBank",
    "FrozenStatsBatchNorm2d",
    "InitialQueries",
    "IoFBiasedSelfAttention",
    "PlainConvNet",
    "SharedNormChannelMapper",
    "StageInteractor",
    "StageInteractorDecoder",
    "SubBoxSampling",
]
