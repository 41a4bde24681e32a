"""Losses of the auxiliary heads, beside those of the base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from deformable_detr.queries import EncoderProposals
from detection_toolkit.training import BranchedCriterion, Criterion
from dino import DenoisingCriterion

from .decoder import DYNAMIC, REGIONAL

__all__ = ["HybridCriterion", "auxiliary_criteria", "weighted"]

_HALF = {REGIONAL: 0.5, DYNAMIC: 0.5}


def weighted(criterion: Criterion, weight: float) -> Criterion:
    """A copy whose losses count so many times; what is matched, and by which costs, is the same."""
    result = copy.deepcopy(criterion)
    for name in ("class_weight", "l1_weight", "giou_weight"):
        setattr(result, name, weight * getattr(result, name))
    return result


def auxiliary_criteria(
    base: BranchedCriterion,
    weights: Mapping[str, float] | None = None,
    *,
    without: Sequence[str] = (EncoderProposals.branch,),
) -> dict[str, Criterion]:
    """The base's criteria once more for each auxiliary head, by the names of their branches.

    Args:
        base: of the base detector.
        weights: of the losses of each head, by its name; None: half for both.
        without: branches of the base that the heads have no part in.
    """
    criteria = {}
    for head, weight in (_HALF if weights is None else weights).items():
        criteria[head] = weighted(base.main, weight)
        for branch, criterion in base.branches.items():
            if branch not in without:
                criteria[f"{head}_{branch}"] = weighted(criterion, weight)
    return criteria


class HybridCriterion(DenoisingCriterion):
    """Losses of DINO, and the same of each auxiliary head: matched on its own, denoising too."""

    def __init__(
        self,
        main: Criterion,
        *,
        encoder: Criterion | None = None,
        denoising: Criterion | None = None,
        auxiliary: Mapping[str, float] | None = None,
    ):
        """
        Args:
            main, encoder, denoising: see :class:`~dino.DenoisingCriterion`.
            auxiliary: weights of the losses of the auxiliary heads, by the names of the refiners;
                None: half for both.
        """
        super().__init__(main, encoder=encoder, denoising=denoising)
        self.branches.update(auxiliary_criteria(self, auxiliary))
