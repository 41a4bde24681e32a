"""AdaMixer (Gao et al., CVPR 2022) on the parts of StageInteractor.

The attention, feed-forward network, prediction towers, cascade, matcher and losses are shared; its
own are the sampling, the mixing and how the centre of a box is refined.
"""

from . import official_names  # noqa: F401  (registers the format of official weights)
from .decoder import AdaMixerDecoder, refine_by_scale
from .mixing import AdaptiveMixing
from .sampling import AdaptiveSampling

__all__ = ["AdaMixerDecoder", "AdaptiveMixing", "AdaptiveSampling", "refine_by_scale"]
