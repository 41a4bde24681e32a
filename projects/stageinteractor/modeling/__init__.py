"""The detector: backbone helpers, neck, queries, decoder stages and the meta-architecture."""

from .attention import IoFBiasedSelfAttention
from .backbone import FrozenStatsBatchNorm2d, PlainConvNet
from .decoder import QUERY_HEADS, CascadeDecoder, StageInteractorDecoder
from .detector import StageInteractor
from .execution import Execution
from .factored_mixing import FactoredDynamicMixing
from .filter_bank import DynamicFilters, FilterBank
from .gathering import GatherableMaps
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
    "Execution",
    "FactoredDynamicMixing",
    "FilterBank",
    "FrozenStatsBatchNorm2d",
    "GatherableMaps",
    "InitialQueries",
    "IoFBiasedSelfAttention",
    "PlainConvNet",
    "SharedNormChannelMapper",
    "StageInteractor",
    "StageInteractorDecoder",
    "SubBoxSampling",
]
