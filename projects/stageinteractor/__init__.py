"""StageInteractor (Teng et al., ICCV 2023): a query-based detector whose stages interact."""

from detection_toolkit import __version__, get_config

# Both register: the format of official weights, and names in config.yaml of older runs.
from . import moved_names, official_names  # noqa: F401
from .attention import IoFBiasedSelfAttention
from .cross_stage_matcher import CrossStageMatcher
from .decoder import FilterBankDecoder, StageInteractorDecoder
from .detector import StageInteractor
from .factored_mixing import FactoredDynamicMixing
from .filter_bank import DynamicFilters, FilterBank
from .mixing import CascadeDynamicMixing
from .queries import InitialQueries
from .sampling import SubBoxSampling
from .stage import DecoderStage
from .viewers import FilterReuse

__all__ = [
    "CascadeDynamicMixing",
    "CrossStageMatcher",
    "DecoderStage",
    "DynamicFilters",
    "FactoredDynamicMixing",
    "FilterBank",
    "FilterBankDecoder",
    "FilterReuse",
    "InitialQueries",
    "IoFBiasedSelfAttention",
    "StageInteractor",
    "StageInteractorDecoder",
    "SubBoxSampling",
    "__version__",
    "get_config",
]
