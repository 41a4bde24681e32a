"""Losses of the encoder's proposals, beside those of the stages."""

from __future__ import annotations

from detection_toolkit.structures import Assignment, GroundTruth
from detection_toolkit.training import BranchedCriterion, Criterion
from detection_toolkit.training.criterion import Outputs, Supervision

from .queries import ProposedQueries

__all__ = ["ProposalCriterion", "TwoStageCriterion"]


class ProposalCriterion(Criterion):
    """Of the encoder's proposals, in which every object has class 0: whether there is any."""

    def supervise(
        self, outputs: Outputs, truth: GroundTruth, assignment: Assignment | None = None
    ) -> Supervision:
        """As :meth:`Criterion.supervise`, with all objects in class 0."""
        truth = truth._replace(labels=truth.labels.new_zeros(truth.labels.shape))
        return super().supervise(outputs, truth, assignment)


class TwoStageCriterion(BranchedCriterion):
    """Losses of the stages and of the proposals that the queries are chosen from."""

    def __init__(self, main: Criterion, proposals: Criterion):
        """
        Args:
            main: of the stages.
            proposals: a :class:`ProposalCriterion`.
        """
        super().__init__(main, {ProposedQueries.branch: proposals})
