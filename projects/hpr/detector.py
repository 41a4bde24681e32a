"""The registered meta-architecture."""

from __future__ import annotations

from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList

from detection_toolkit.structures import Branch, GroundTruth, Predictions, StageOutput
from dino import DINO

__all__ = ["HPR", "auxiliary_branches"]


def auxiliary_branches(predictions: Predictions) -> list[Branch]:
    """What further heads of the stages say, as branches: of the detecting queries under the name of
    the head, of any other branch's queries under both names."""
    found = []
    for head in predictions.stages[0].auxiliary or ():
        for name, outputs, assignment in (("", predictions.stages, None), *predictions.branches):
            own = [x.auxiliary[head] for x in outputs if isinstance(x, StageOutput) and x.auxiliary]
            if own:
                found.append(Branch(f"{head}_{name}" if name else head, own, assignment))
    return found


@META_ARCH_REGISTRY.register()
class HPR(DINO):
    """Hybrid Proposal Refiner (Zhao et al., CVPR 2024) on DINO, or without denoising on the
    improved Deformable DETR.

    The flow is DINO's. What differs are :class:`~hpr.HybridDecoder`, and that its auxiliary heads
    are supervised.
    """

    def __init__(self, **parts: Any):
        """
        Args:
            parts: as of :class:`~dino.DINO`.
        """
        super().__init__(**parts)
        # The branch of the proposals starts as those of the stages do.
        of_stage = self.decoder.get_submodule("stages.0.head")
        self.initial_queries.get_submodule("head").load_state_dict(of_stage.state_dict())

    def predict(self, images: ImageList, truth: GroundTruth | None = None) -> Predictions:
        """As :meth:`DINO.predict`, in training with branches of the auxiliary heads."""
        predictions = super().predict(images, truth)
        if not self.training:
            return predictions
        auxiliary = auxiliary_branches(predictions)
        return predictions._replace(branches=(*predictions.branches, *auxiliary))
