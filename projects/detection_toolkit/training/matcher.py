"""Bipartite matching of queries and objects, all stages and images in one call.

Letters: S stages, B images, N queries, M objects, K classes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import NonFinitePredictionError, UserError
from ..structures import Assignment, GroundTruth, generalized_box_iou
from ..structures.boxes import xyxy_norm
from .losses import focal_cost

__all__ = ["HungarianMatcher", "MatchingCost"]

# Costs of a step: so many take one thread some milliseconds.
_WORTH_THREADS = 2**18


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="matcher")


class MatchingCost(NamedTuple):
    """Terms before weighting and their weighted sum, each (S, B, N, M)."""

    classification: Tensor
    l1: Tensor
    giou: Tensor
    total: Tensor


class HungarianMatcher(nn.Module):
    """Bipartite matching by classification, L1 and GIoU cost (DETR and its family).

    The GIoU term is in pixels, with a floor of 1e-6 on union and enclosing area.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        *,
        class_cost: Callable[[Tensor], Tensor] = focal_cost,
        box_code: Callable[[Tensor, Tensor], Tensor] = xyxy_norm,
        repeats: int | Sequence[int] = 1,
    ):
        """
        Args:
            class_weight, l1_weight, giou_weight: of the three terms.
            class_cost: logits of the objects' classes, any shape -> cost, the same shape.
            box_code: (boxes, sizes of their images) -> the code whose L1 distance is a cost:
                :func:`~detection_toolkit.structures.boxes.xyxy_norm` or ``cxcywh_norm``.
            repeats: k, how many queries an object is matched to at most, in all stages or one
                number a stage. Where queries are few, to N // M of them, and at least one.

        Raises:
            UserError: a negative weight, no weight above 0, or k below 1.
        """
        super().__init__()
        if min(class_weight, l1_weight, giou_weight) < 0:
            raise UserError(
                "matching cost weights must not be negative, got "
                f"class {class_weight}, L1 {l1_weight}, GIoU {giou_weight}"
            )
        if class_weight == l1_weight == giou_weight == 0:
            raise UserError(
                "all matching cost weights are zero: the match would be arbitrary. Set "
                "class_weight, l1_weight or giou_weight of the matcher"
            )
        if min([repeats] if isinstance(repeats, int) else repeats) < 1:
            raise UserError(f"repeats of a matcher must be at least 1, got {repeats}")
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.class_cost = class_cost
        self.box_code = box_code
        self.repeats = repeats

    @torch.no_grad()
    def cost(self, logits: Tensor, boxes: Tensor, truth: GroundTruth) -> MatchingCost:
        """Cost of every query for every object.

        Args:
            logits: (S, B, N, K).
            boxes: (S, B, N, 4) ``xyxy`` in pixels.
            truth: B images of up to M objects. Columns past an image's own objects are padding.
        """
        num_stages, _, num_queries, _ = logits.shape
        index = truth.labels[None, :, None, :].expand(num_stages, -1, num_queries, -1)
        classification = self.class_cost(logits.gather(3, index))

        sizes = truth.image_sizes[:, None]  # (B, 1, 2)
        code = self.box_code(boxes, sizes)
        true_code = self.box_code(truth.boxes, sizes)
        l1 = torch.cdist(code, true_code.expand(num_stages, -1, -1, -1), p=1)

        giou = -generalized_box_iou(boxes[:, :, :, None], truth.boxes[:, None])
        total = self.class_weight * classification + self.l1_weight * l1 + self.giou_weight * giou
        return MatchingCost(classification, l1, giou, total)

    def count_matches(
        self, num_objects: Sequence[int], *, num_stages: int, num_queries: int
    ) -> list[int]:
        """Queries of a batch that each stage has matched, whatever it predicts.

        Args:
            num_objects: of each image.
            num_stages, num_queries: S and N.
        """
        self._check_repeats(num_stages)
        return [
            sum(min(n * self._copies(stage, n, num_queries), num_queries) for n in num_objects)
            for stage in range(num_stages)
        ]

    def _check_repeats(self, num_stages: int) -> None:
        if not isinstance(self.repeats, int) and len(self.repeats) != num_stages:
            raise UserError(
                f"the matcher has repeats for {len(self.repeats)} stages, the predictions are of "
                f"{num_stages}"
            )

    def _copies(self, stage: int, num_objects: int, num_queries: int) -> int:
        """How often each object of an image is to be matched at a stage."""
        repeats = self.repeats if isinstance(self.repeats, int) else self.repeats[stage]
        return max(1, min(repeats, num_queries // max(num_objects, 1)))

    @torch.no_grad()
    def forward(
        self, logits: Tensor, boxes: Tensor, truth: GroundTruth, active: Tensor | None = None
    ) -> Assignment:
        """Match every object of every stage and image, as far as there are queries.

        Args:
            logits: (S, B, N, K) class logits of all stages.
            boxes: (S, B, N, 4) boxes of all stages, ``xyxy`` in pixels.
            truth: the objects of the B images.
            active: (S, B, N) bool: queries that there are to match; None: all.

        Raises:
            NonFinitePredictionError: a cost is NaN or infinite; names stages and images.
        """
        # One copy to the host for all stages and images.
        total = self.cost(logits, boxes, truth).total.cpu().numpy()
        from scipy.optimize import linear_sum_assignment  # slow to load, and not for inference

        num_stages, num_images, num_queries, _ = total.shape
        self._check_repeats(num_stages)
        matches = np.full((num_stages, num_images, num_queries), -1, dtype=np.int64)
        there = np.ones(matches.shape, dtype=bool) if active is None else active.cpu().numpy()

        def match(b: int) -> list[tuple[int, int]]:
            """Match the objects of an image; where a cost is not finite."""
            count, not_finite = truth.num_objects[b], []
            for s in range(num_stages):
                cost, rows = total[s, b, :, :count], np.flatnonzero(there[s, b])
                if len(rows) < num_queries:
                    cost = cost[rows]
                if not np.isfinite(cost).all():
                    not_finite.append((s, b))
                    continue
                tiled = np.tile(cost, self._copies(s, count, len(rows)))
                queries, objects = linear_sum_assignment(tiled)
                matches[s, b, rows[queries]] = objects % max(count, 1)
            return not_finite

        # SciPy lets go of the interpreter, so that threads gain where the problems are large.
        in_threads = num_stages * num_queries * sum(truth.num_objects) >= _WORTH_THREADS
        run = _threads().map if in_threads else map
        not_finite = [where for found in run(match, range(num_images)) for where in found]
        if not_finite:
            raise NonFinitePredictionError(sorted(not_finite))
        return Assignment(torch.from_numpy(matches).to(logits.device, non_blocking=True))
