"""The registered meta-architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import FeatureMaps, QueryDetector
from detection_toolkit.structures import GroundTruth, HeadOutput, Predictions, StageOutput

from .attention import DeformableAttention
from .decoder import DeformableDETRDecoder
from .encoder import DeformableEncoder
from .queries import InitialQueries, ProposedQueries

__all__ = ["DeformableDETR"]


@META_ARCH_REGISTRY.register()
class DeformableDETR(QueryDetector):
    """Deformable DETR (Zhu et al., ICLR 2021).

    It is plain with :class:`~deformable_detr.LearnedQueries` and
    :class:`~deformable_detr.DeformableDETRDecoder`, refines boxes with
    :class:`~deformable_detr.RefiningDeformableDETRDecoder`, and is two-stage with
    :class:`~deformable_detr.ProposedQueries` besides.
    """

    initial_queries: InitialQueries

    def __init__(
        self,
        *,
        encoder: DeformableEncoder,
        initial_queries: InitialQueries,
        size_divisibility: int = 1,
        **others: Any,
    ):
        """
        Args:
            encoder: between the maps of the backbone and what the queries look at.
            initial_queries: their source.
            size_divisibility: batches are padded to their largest image alone.
            others: as of :class:`~detection_toolkit.modeling.QueryDetector`.

        Raises:
            UserError: encoder or decoder are for another number of levels than the backbone yields,
                or proposals are not refined.
        """
        super().__init__(
            initial_queries=initial_queries, size_divisibility=size_divisibility, **others
        )
        self.encoder: nn.Module = encoder
        self._check_parts()

    def _check_parts(self) -> None:
        num_levels = len(self.strides)
        for name, module in self.named_modules():
            if isinstance(module, DeformableAttention) and module.num_levels != num_levels:
                part = f"model.{name.partition('.')[0]}"
                raise UserError(
                    f"{part} is built for {module.num_levels} levels, but the backbone yields "
                    f"{num_levels}: set {part}.num_levels={num_levels}, or change "
                    "model.backbone.in_features"
                )
        if isinstance(self.initial_queries, ProposedQueries) and isinstance(
            self.decoder, DeformableDETRDecoder
        ):
            raise UserError(
                "a two-stage model refines boxes, and DeformableDETRDecoder keeps them: set "
                "model.decoder._target_=deformable_detr.RefiningDeformableDETRDecoder, or "
                "model.initial_queries._target_=deformable_detr.LearnedQueries"
            )

    def extract_features(self, images: ImageList) -> FeatureMaps:
        """The encoder's maps of a normalised batch, finest first."""
        return self.encoder(super().extract_features(images))

    def predict(self, images: ImageList, truth: GroundTruth | None = None) -> Predictions:
        """Predictions for a normalised batch; in training with the branches of the queries."""
        maps = self.extract_features(images)
        queries, branches = self.initial_queries.propose(maps)
        return Predictions(self.decoder(maps, queries), branches if self.training else ())

    def inference(
        self,
        output: StageOutput | HeadOutput,
        image_sizes: Sequence[tuple[int, int]],
        *,
        stage: int = -1,
        names: Sequence[str] | None = None,
    ) -> list[Instances]:
        """As :meth:`QueryDetector.inference`, clipped to the images."""
        detections = super().inference(output, image_sizes, stage=stage, names=names)
        for instances in detections:
            instances.pred_boxes.clip(instances.image_size)
        return detections
