"""The registered meta-architecture."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY

from dino import DINO

__all__ = ["AlignDETR"]


@META_ARCH_REGISTRY.register()
class AlignDETR(DINO):
    """Align-DETR (Cai et al., BMVC 2024).

    Flow and parts are DINO's, with other position codes in the encoder; the stages and the encoder
    have a :class:`~align_detr.RankedCriterion`, the denoising queries an
    :class:`~align_detr.AlignedCriterion`.
    """
