"""Numeric cases of DDQ's dense losses: matching, grades and gradients of given predictions.

Letters: B images, N queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deformable_detr.heads import boxes_in_pixels
from detection_toolkit.parity import CASE_KINDS, Case, CaseKind, Inputs, Limit, Quantity, Settings
from detection_toolkit.parity.compare import EXACT, Table, expand, gradient, value
from detection_toolkit.parity.detector import read_truth
from detection_toolkit.structures import GroundTruth, HeadOutput
from detection_toolkit.structures.boxes import cxcywh_norm, xyxy_norm
from detection_toolkit.training import HungarianMatcher, StagewiseMatcher
from detection_toolkit.training.criterion import Supervision

from .criterion import DenseCriterion, TwiceSquashedCost

__all__ = ["DenseLossCase", "dense_criterion", "losses_of_images"]

LOSS = Limit(relative=1e-4)
_GRADIENT = gradient(0.0, 1e-3)


class _Run(NamedTuple):
    supervision: Supervision
    losses: tuple[Tensor, Tensor]
    gradients: dict[str, Tensor | None]


def dense_criterion(num_classes: int, repeats: int = 4) -> DenseCriterion:
    """The criterion of dense queries, as released."""
    return DenseCriterion(
        num_classes=num_classes,
        matcher=HungarianMatcher(
            class_cost=TwiceSquashedCost(), box_code=xyxy_norm, repeats=repeats
        ),
        label_assigner=StagewiseMatcher(),
        class_weight=1.0,
        box_code=cxcywh_norm,
        giou_eps=1e-7,
    )


def losses_of_images(criterion: DenseCriterion, supervision: Supervision) -> tuple[Tensor, Tensor]:
    """(S, B) class losses and GIoU losses of each image, divided by the sum over the batch."""
    logits, boxes, truth, assignment, targets, weights, counts = supervision
    found = []
    for b, count in enumerate(truth.num_objects):
        own = slice(b, b + 1)
        of_image = Supervision(
            logits[:, own],
            boxes[:, own],
            GroundTruth(truth.boxes[own], truth.labels[own], (count,), truth.image_sizes[own]),
            assignment._replace(object_index=assignment.object_index[:, own]),
            targets._replace(multi_hot=targets.multi_hot[:, own]),
            weights[:, own],
            counts,
        )
        found.append(criterion.losses(of_image, *counts.clamp(min=1).unbind(1)))
    return (
        torch.stack([x.loss_cls for x in found], dim=1),
        torch.stack([x.loss_giou for x in found], dim=1),
    )


@CASE_KINDS.register()
class DenseLossCase(CaseKind):
    """Grades, losses and their gradients on given predictions, without a network."""

    title = "losses of DDQ's dense queries"
    information = ("config_json",)

    @classmethod
    def matches(cls, case: Case) -> bool:
        return {"config_json", "in/logits", "alignment", "losses/aux_loss_cls"} <= case.names

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.image_sizes = [(int(h), int(w)) for h, w in self.config["img_shapes"]]

    def quantities(self) -> Iterator[Quantity]:
        table: Table = {
            "assigned_gt": (EXACT, lambda run: run.supervision.assignment.object_index[0]),
            "alignment": (value, lambda run: run.supervision.box_weights[0]),
            "losses/aux_loss_cls": (LOSS, lambda run: run.losses[0][0]),
            "losses/aux_loss_bbox": (LOSS, lambda run: run.losses[1][0]),
            "grad/logits": (_GRADIENT, lambda run: run.gradients["logits"]),
            "grad/boxes": (_GRADIENT, lambda run: run.gradients["boxes"]),
        }
        yield from expand(table)

    def compute(self, settings: Settings) -> _Run:
        inputs = Inputs(self.case, settings)
        truth = read_truth(inputs, "gt/", self.image_sizes)
        logits, boxes = (inputs.tensor(f"in/{x}").requires_grad_() for x in ("logits", "boxes"))
        criterion = dense_criterion(int(self.config["C"]), int(self.config["topk"]))
        output = HeadOutput(logits, boxes_in_pixels(boxes, torch.tensor(self.image_sizes)))
        supervision = criterion.supervise([output], truth)
        losses = losses_of_images(criterion, supervision)
        torch.stack(losses).sum().backward()
        return _Run(supervision, losses, {"logits": logits.grad, "boxes": boxes.grad})
