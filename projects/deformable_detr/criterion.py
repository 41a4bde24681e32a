"""Losses that are no stage's."""

from __future__ import annotations

from detection_toolkit.structures import Assignment, GroundTruth
from detection_toolkit.training import Criterion
from detection_toolkit.training.criterion import Outputs, Supervision

__all__ = ["ProposalCriterion"]


class ProposalCriterion(Criterion):
    """Of the encoder's proposals, in which every object has class 0: whether there is any."""

    def supervise(
        self, outputs: Outputs, truth: GroundTruth, assignment: Assignment | None = None
    ) -> Supervision:
        """As :meth:`Criterion.supervise`, with all objects in class 0."""
        truth = truth._replace(labels=truth.labels.new_zeros(truth.labels.shape))
        return super().supervise(outputs, truth, assignment)
