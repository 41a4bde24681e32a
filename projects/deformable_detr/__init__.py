"""Deformable DETR (Zhu et al., ICLR 2021): plain, with box refinement, two-stage."""

from . import checkpoint  # noqa: F401  (registers the format of official weights)
from .attention import DeformableAttention
from .criterion import ProposalCriterion, TwoStageCriterion
from .cross_stage import AnyPairMatcher, LastCandidateCriterion
from .decoder import DeformableDETRDecoder, RefiningDeformableDETRDecoder
from .detector import DeformableDETR
from .encoder import DeformableEncoder
from .neck import ExtraLevelMapper, LevelMapper
from .queries import LearnedQueries, ProposedQueries

__all__ = [
    "AnyPairMatcher",
    "DeformableAttention",
    "DeformableDETR",
    "DeformableDETRDecoder",
    "DeformableEncoder",
    "ExtraLevelMapper",
    "LastCandidateCriterion",
    "LearnedQueries",
    "LevelMapper",
    "ProposalCriterion",
    "ProposedQueries",
    "RefiningDeformableDETRDecoder",
    "TwoStageCriterion",
]
