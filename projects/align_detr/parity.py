"""Numeric cases of Align-DETR's losses: matching, labels and gradients of given predictions.

Letters: S stages, B images, N queries, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deformable_detr.heads import boxes_in_pixels
from detection_toolkit.parity import CASE_KINDS, Case, CaseKind, Inputs, Limit, Quantity, Settings
from detection_toolkit.parity.case import Config
from detection_toolkit.parity.compare import EXACT, Table, expand, gradient, value
from detection_toolkit.parity.detector import read_truth
from detection_toolkit.structures import Assignment, Branch, HeadOutput, Predictions
from detection_toolkit.structures.boxes import cxcywh_norm
from detection_toolkit.training import (
    BranchedResult,
    HungarianMatcher,
    MatchNormalizer,
    StagewiseMatcher,
)
from detection_toolkit.training.criterion import Supervision
from dino import DenoisingCriterion

from .criterion import AlignedCriterion, RankedCriterion

__all__ = ["AlignLossCase", "aligned_parts"]

LOSS = Limit(relative=1e-4)
TERMS = {"loss_cls": "loss_cls", "loss_bbox": "loss_bbox", "loss_iou": "loss_giou"}
_GRADIENT = gradient(0.0, 1e-3)
_INPUTS = ("logits", "boxes", "enc_logits", "enc_boxes", "dn_logits", "dn_boxes")


class _Run(NamedTuple):
    losses: BranchedResult
    supervisions: dict[str, Supervision]
    criterion: DenoisingCriterion
    gradients: dict[str, Tensor | None]


def aligned_parts(config: Config) -> dict[str, Any]:
    """The criteria of stages, encoder and denoising that a case's config describes."""
    *of_stages, of_encoder = (int(k) for k in config["repeat"])
    parts: dict[str, Any] = dict(
        num_classes=int(config["C"]),
        label_assigner=StagewiseMatcher(),
        class_weight=1.0,
        box_code=cxcywh_norm,
        giou_eps=1e-7,
        normalizer=MatchNormalizer(),
        # These are constants of the released code, which not every case repeats.
        alpha=config.get("alpha", 0.25),
        gamma=config.get("gamma", 2.0),
    )

    def matcher(repeats: int | list[int]) -> HungarianMatcher:
        return HungarianMatcher(box_code=cxcywh_norm, repeats=repeats)

    tau = config.get("tau", 1.5)
    return dict(
        main=RankedCriterion(matcher=matcher(of_stages), tau=tau, **parts),
        encoder=RankedCriterion(matcher=matcher(of_encoder), tau=tau, **parts),
        denoising=AlignedCriterion(matcher=matcher(1), **parts),
    )


def _stage(t: int, num_stages: int) -> str:
    return "" if t == num_stages - 1 else f"d{t}."


def _loss(branch: str, term: str, t: int, run: _Run) -> Tensor:
    losses = run.losses.branches[branch] if branch else run.losses.main
    return getattr(losses, term)[t]


def _targets(branch: str, t: int) -> Table:
    """Of one stage of a branch."""

    def class_weights(run: _Run) -> Tensor:
        supervision = run.supervisions[branch]
        loss: Any = run.criterion.main.class_loss
        return loss.weights(supervision.logits, supervision.targets.multi_hot)[t]

    return {
        "class_targets": (value, lambda run: run.supervisions[branch].targets.multi_hot[t]),
        "class_weights": (value, class_weights),
        "box_weights": (
            value,
            lambda run: run.supervisions[branch].box_weights[t][..., None].expand(-1, -1, 4),
        ),
    }


@CASE_KINDS.register()
class AlignLossCase(CaseKind):
    """Labels, losses and their gradients on given predictions, without a network."""

    title = "losses of Align-DETR"
    information = ("config_json",)

    @classmethod
    def matches(cls, case: Case) -> bool:
        if not {"config_json", "in/dn_logits", "weight_table"} <= case.names:
            return False
        return {"repeat", "dn_groups"} <= set(case.config("config_json"))

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.image_sizes = [(int(h), int(w)) for h, w in self.config["img_shapes"]]
        self.num_stages = len(case.array("in/logits"))

    def quantities(self) -> Iterator[Quantity]:
        stages = range(self.num_stages)
        places = [(f"layer{t}", "", t) for t in stages] + [("enc", "encoder", 0)]
        for name, branch, t in places:
            matches: Table = {
                "assigned_gt": (
                    EXACT,
                    lambda run, branch=branch, t=t: run.supervisions[
                        branch
                    ].assignment.object_index[t],
                )
            }
            yield from _at(name, {**matches, **_targets(branch, t)})
        for t in stages:
            yield from _at(f"dn{t}", _targets("denoising", t))
        for official, term in TERMS.items():
            for t in stages:
                begin = _stage(t, self.num_stages)
                yield Quantity(f"losses/{begin}{official}", LOSS, partial(_loss, "", term, t))
                of_noise = partial(_loss, "denoising", term, t)
                yield Quantity(f"losses/{begin}dn_{official}", LOSS, of_noise)
            yield Quantity(f"losses/enc_{official}", LOSS, partial(_loss, "encoder", term, 0))
        gradients: Table = {x: (_GRADIENT, lambda run, x=x: run.gradients[x]) for x in _INPUTS}
        yield from expand(gradients, "grad/")
        yield Quantity("weight_table", value, self._weight_table)

    def _weight_table(self, run: _Run) -> np.ndarray:
        """Weights of the first ranks: of each stage, and of the encoder, so many as an object is
        matched to."""
        shape = self.case.array("weight_table").shape
        criterion = run.criterion.main
        assert isinstance(criterion, RankedCriterion)
        rank = torch.arange(shape[1]).expand(shape)
        weights = criterion.rank_weights(-rank.double(), Assignment(torch.zeros_like(rank)))
        repeats = torch.tensor([int(k) for k in self.config["repeat"]])[:, None]
        return torch.where(rank < repeats, weights, 0).numpy()

    def compute(self, settings: Settings) -> _Run:
        inputs = Inputs(self.case, settings)
        truth = read_truth(inputs, "gt/", self.image_sizes)
        sizes = torch.tensor(self.image_sizes)
        leaves = {x: inputs.tensor(f"in/{x}").requires_grad_() for x in _INPUTS}

        def outputs(prefix: str) -> list[Any]:
            logits, boxes = (leaves[prefix + x] for x in ("logits", "boxes"))
            if logits.dim() == 3:
                logits, boxes = logits[None], boxes[None]
            return [HeadOutput(x, boxes_in_pixels(y, sizes)) for x, y in zip(logits, boxes)]

        criterion: Any = DenoisingCriterion(**aligned_parts(self.config))
        assignment = Assignment(self._denoised(truth.num_objects))
        predictions = Predictions(
            outputs(""),
            (
                Branch("encoder", outputs("enc_")),
                Branch("denoising", outputs("dn_"), assignment),
            ),
        )
        losses = criterion(predictions, truth)
        torch.stack(list(losses.as_dict().values())).sum().backward()
        supervisions = {"": criterion.main.supervise(predictions.stages, truth)}
        for branch in predictions.branches:
            supervisions[branch.name] = criterion.branches[branch.name].supervise(
                branch.outputs, truth, branch.assignment
            )
        return _Run(losses, supervisions, criterion, {k: x.grad for k, x in leaves.items()})

    def _denoised(self, num_objects: tuple[int, ...]) -> Tensor:
        """(S, B, D) objects of the denoising queries: in each group a slot for each object of the
        fullest image, of which the first half of the group is to restore its own."""
        groups = int(self.config["dn_groups"])
        num_queries = self.case.array("in/dn_logits").shape[2]
        slots = torch.arange(num_queries // (2 * groups))
        nobody = torch.full_like(slots, -1)
        index = torch.stack(
            [
                torch.cat([torch.where(slots < count, slots, -1), nobody]).repeat(groups)
                for count in num_objects
            ]
        )
        return index.expand(self.num_stages, -1, -1)


def _at(place: str, table: Table) -> Iterator[Quantity]:
    for name, (limit, ours) in table.items():
        yield Quantity(f"{name}/{place}", limit, ours)
