"""Numeric cases of HPR on Align-DETR and on DDQ.

Letters: B images, N queries, D denoising ones before them, Q distinct and M dense ones, S stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from align_detr.parity import aligned_parts
from ddq import DistinctQueries
from ddq.decoder import DistinctSelection
from ddq.parity import dense_criterion, losses_of_images
from detection_toolkit.modeling import QueryDetector
from detection_toolkit.parity import CASE_KINDS, Quantity, expand
from detection_toolkit.parity.compare import EXACT, Table, of_part, value
from detection_toolkit.parity.detector import Run, Trace
from detection_toolkit.training import BranchedCriterion

from .criterion import HybridCriterion
from .ddq import HPRDDQ, HybridDDQCriterion, HybridDDQDecoder
from .official_names_of_ddq import HPR_DDQ_WEIGHTS
from .parity import HEADS, LOSS, HybridCase, boxes_in_shares, of_branch

__all__ = ["AlignDETRBaseCase", "DDQBaseCase"]


@CASE_KINDS.register()
class AlignDETRBaseCase(HybridCase):
    """HPR on Align-DETR."""

    title = "HPR on Align-DETR"
    kinds = ("align_detr",)

    def criterion(self) -> BranchedCriterion:
        parts = aligned_parts(self.config)
        if not self.has_denoising:
            del parts["denoising"]
        return HybridCriterion(**parts, auxiliary=self.auxiliary_weights)


@CASE_KINDS.register()
class DDQBaseCase(HybridCase):
    """HPR on DDQ."""

    title = "HPR on DDQ"
    kinds = ("ddq",)
    weight_format = HPR_DDQ_WEIGHTS

    @property
    def iou_threshold(self) -> float:
        """Of all choices of distinct queries."""
        return float(self.config["nms"])

    def detector(self, **parts: Any) -> QueryDetector:
        return HPRDDQ(**parts)

    def initial_queries(self) -> nn.Module:
        return DistinctQueries(
            int(self.config["Q"]),
            int(self.config["D"]),
            int(self.config["C"]),
            dense_ratio=float(self.config["dense_ratio"]),
            iou_threshold=self.iou_threshold,
        )

    def decoder(self, **options: Any) -> nn.Module:
        num_classes = int(self.config["C"])
        return HybridDDQDecoder(num_classes, iou_threshold=self.iou_threshold, **options)

    def criterion(self) -> BranchedCriterion:
        num_classes = int(self.config["C"])
        return HybridDDQCriterion(
            self.losses(),
            encoder=self.losses(),
            dense=dense_criterion(num_classes),
            dense_encoder=dense_criterion(num_classes),
            denoising=self.losses() if self.has_denoising else None,
            auxiliary=self.auxiliary_weights,
        )

    def trace(self, model: QueryDetector) -> Trace:
        trace = super().trace(model)
        selection = model.decoder.selection
        selection.register_forward_hook(lambda _, __, output: trace.keep("active", output[1]))
        plain = DistinctSelection.survivors

        def survivors(boxes: Tensor, scores: Tensor, active: Tensor | None) -> Tensor:
            found = plain(selection, boxes, scores, active)
            trace.keep("survivors", found)
            return found

        selection.survivors = survivors
        return trace

    def quantities(self) -> Iterator[Quantity]:
        yield from super().quantities()
        choices: Table = {
            "distinct_kept": (EXACT, lambda run: torch.stack(run.trace.all("survivors"))),
            "distinct_mask": (EXACT, lambda run: torch.stack(run.trace.all("active"))),
        }
        for part in ("infer", "train")[: 1 + self.is_training]:
            if self.num_stages > 1:  # nothing is chosen after the last
                yield from of_part(part, expand(choices, f"{part}/"))
        if self.is_training:
            dense: Table = {
                "logits": (value, lambda run: _chosen_dense(run).logits),
                "boxes": (value, lambda run: boxes_in_shares(_chosen_dense(run).boxes, run)),
            }
            yield from of_part("train", expand(dense, "train/dense_enc_"))

    def quantities_of_denoising(self) -> Iterator[Quantity]:
        for quantity in super().quantities_of_denoising():
            if quantity.name == "dn/mask":  # of the queries before dense ones are put beside them
                first = len(self.case.array("dn/mask"))
                ours = partial(_mask_of_first, first)
                quantity = replace(quantity, ours=ours)
            yield quantity

    def quantities_of_losses(self) -> Iterator[Quantity]:
        for quantity in super().quantities_of_losses():
            # Where queries are inactive, matches are of the active ones, one array for each image.
            if f"{quantity.name}/0" not in self.case.names:
                yield quantity
                continue
            stage = int(quantity.name.rpartition("layer")[2])
            for b in self.images:
                ours = partial(_of_active, quantity.ours, stage, b)
                yield Quantity(f"{quantity.name}/{b}", EXACT, ours)
        for head, branch in HEADS.items():
            dense = f"{branch}_dense" if branch else "dense"
            prefix = {"main": "", "aux0": "hpr_0_", "aux1": "hpr_1_"}[head]
            for t in range(self.num_stages):
                yield from self._dense(f"{prefix}{t}_aux_", f"train/{head}", f"layer{t}", dense, t)
        yield from self._dense("aux_enc_", "train/main", "enc", "dense_encoder", 0)

    def _dense(
        self, loss: str, head: str, place: str, branch: str, stage: int
    ) -> Iterator[Quantity]:
        """Matches and losses of dense queries, of each image."""
        for b in self.images:
            matches = partial(_match, branch, stage, b)
            yield Quantity(f"{head}/dense_assigned_gt/{place}/{b}", EXACT, matches)
            for which, name in enumerate(("cls", "bbox")):
                ours = partial(_dense_loss, branch, which, stage, b)
                yield Quantity(f"train/losses/{loss}aux_loss_{name}_{b}", LOSS, ours)


def _mask_of_first(count: int, run: Run) -> Tensor:
    return run.trace["queries"].attention_mask[:count, :count]


def _chosen_dense(run: Run) -> Any:
    branches = run.trace["predictions"].branches
    return next(branch.outputs[0] for branch in branches if branch.name == "dense_encoder")


def _of_active(matches: Any, stage: int, image: int, run: Run) -> Tensor:
    found = matches(run)[image]
    return found[run.trace.all("active")[stage - 1][image]] if stage else found


def _match(branch: str, stage: int, image: int, run: Run) -> Tensor:
    return of_branch(branch, run).assignment.object_index[stage, image]


def _dense_loss(branch: str, which: int, stage: int, image: int, run: Run) -> Tensor:
    predictions = run.trace["predictions"].branches
    outputs = next(x.outputs for x in predictions if x.name == branch)
    criterion = run.model.criterion.branches[branch]
    supervision = criterion.supervise(outputs, run.truth)
    return losses_of_images(criterion, supervision)[which][stage, image]
