"""The meta-architecture."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY

from detection_toolkit.modeling import QueryDetector

__all__ = ["StageInteractor"]


@META_ARCH_REGISTRY.register()
class StageInteractor(QueryDetector):
    """Query-based detector whose stages interact (Teng et al., ICCV 2023).

    What interacts are its parts: the decoder, whose stages share a filter bank
    (:class:`~stageinteractor.StageInteractorDecoder`), and the criterion's label assigner
    (:class:`~stageinteractor.CrossStageMatcher`).
    """
