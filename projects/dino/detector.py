"""The registered meta-architectures.

Letters: B images, N detecting queries, D denoising queries, S stages.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor

from deformable_detr import DeformableDETR
from detection_toolkit.structures import (
    Assignment,
    Branch,
    GroundTruth,
    HeadOutput,
    Predictions,
    Queries,
    StageOutput,
)

from .denoising import Denoising

__all__ = ["DENOISING", "DINO", "DNDeformableDETR", "no_objects", "only"]

DENOISING = "denoising"
"""The branch of the denoising queries."""


@META_ARCH_REGISTRY.register()
class DNDeformableDETR(DeformableDETR):
    """DN-Deformable-DETR (Li et al., CVPR 2022): Deformable DETR with boxes as queries, which in
    training restores noised objects besides."""

    def __init__(self, *, denoising: Denoising | None, **others: Any):
        """
        Args:
            denoising: None for none; then neither has the criterion.
            others: as of :class:`~deformable_detr.DeformableDETR`.
        """
        super().__init__(**others)
        self.denoising = denoising

    def predict(self, images: ImageList, truth: GroundTruth | None = None) -> Predictions:
        """Predictions for a normalised batch; in training with the branches.

        Args:
            images: the batch.
            truth: in training, the objects to be noised; None, where the stages alone are of
                interest, for no denoising query.
        """
        if not self.training or self.denoising is None:
            return super().predict(images, truth)
        maps = self.extract_features(images)
        queries, branches = self.initial_queries.propose(maps)
        if truth is None:
            truth = no_objects(images, maps.image_sizes)
        queries, object_index = self.denoising(queries, truth)
        outputs = self.decoder(maps, queries)
        count = object_index.shape[1]
        denoised = [only(x, slice(count)) for x in outputs]
        assignment = Assignment(object_index.expand(len(outputs), -1, -1))
        return Predictions(
            [only(x, slice(count, None)) for x in outputs],
            (*branches, Branch(DENOISING, denoised, assignment)),
        )


@META_ARCH_REGISTRY.register()
class DINO(DNDeformableDETR):
    """DINO (Zhang et al., ICLR 2023).

    The flow is DN-Deformable-DETR's; what differs are the parts:
    :class:`~dino.ContrastiveDenoising`, :class:`~dino.MixedQueries` and
    :class:`~dino.DINODecoder`.
    """


def only(output: StageOutput, rows: slice) -> StageOutput:
    """What is said of some of the queries."""
    queries = output.queries
    active = output.active
    return StageOutput(
        output.logits[:, rows],
        output.boxes[:, rows],
        Queries(queries.content[:, rows], queries.geometry[:, rows]),
        output.auxiliary and {name: _of(x, rows) for name, x in output.auxiliary.items()},
        active if active is None else active[:, rows],
    )


def _of(output: HeadOutput, rows: slice) -> HeadOutput:
    active = output.active
    return HeadOutput(
        output.logits[:, rows],
        output.boxes[:, rows],
        active if active is None else active[:, rows],
    )


def no_objects(images: ImageList, like: Tensor) -> GroundTruth:
    """The truth of a batch without any object, on the device of a tensor."""
    count = len(images.image_sizes)
    boxes = [torch.zeros(0, 4, device=like.device)] * count
    return GroundTruth.collate(boxes, [x[:, 0].long() for x in boxes], images.image_sizes)
