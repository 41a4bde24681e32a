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

    def targets_of_truth(
        self, truth: GroundTruth, *, num_stages: int, num_queries: int
    ) -> list[int] | None:
        """As :meth:`Criterion.targets_of_truth`; the proposals follow the stages."""
        if max(truth.num_objects) > num_queries:
            return None  # there are more proposals than queries; how many, the image's size decides
        parts = [
            criterion.targets_of_truth(truth, num_stages=count, num_queries=num_queries)
            for criterion, count in (
                (self.main, num_stages),
                (self.branches[ProposedQueries.branch], 1),
            )
        ]
        return None if None in parts else [count for part in parts for count in part]
