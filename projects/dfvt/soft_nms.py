"""Soft-NMS, with which the published DFvT-B was tested, in Detectron2's two-stage detectors."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_iou

__all__ = ["SoftNMSFastRCNNOutputLayers", "SoftNMSRPN", "soft_nms"]

# An overlap that no two boxes have: Detectron2's functions then return every candidate.
_NEVER = 2.0
_CHECK_PERIOD = 32


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    *,
    iou_threshold: float,
    max_kept: int,
    min_score: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS with linear decay (Bodla et al., ICCV 2017), in all groups at once.

    The best box is kept; every other box of its group that overlaps it by at least
    ``iou_threshold`` has its score multiplied by 1 - IoU; and so on.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,) in [0, 1].
        groups: (N,) integers, such as classes; boxes of different groups do not interact.
        iou_threshold: see above.
        max_kept: the result's largest length.
        min_score: boxes whose score is or falls below it are dropped.

    Returns:
        indices (M,) of the kept boxes, and their decayed scores (M,), highest first.
    """
    candidates = (scores >= min_score).nonzero()[:, 0]
    # Half precision has too few bits for many decays.
    boxes, remaining = (
        x[candidates].to(torch.promote_types(x.dtype, torch.float32)) for x in (boxes, scores)
    )
    groups = groups[candidates]
    picked, picked_scores = [], []
    for step in range(min(len(candidates), max_kept)):
        best, index = remaining.max(dim=0, keepdim=True)
        # Now and then only: on a GPU looking at a value waits for all work before it.
        if step % _CHECK_PERIOD == 0 and float(best) < min_score:
            break
        picked.append(index)
        picked_scores.append(best)
        iou = box_iou(boxes.index_select(0, index), boxes)[0]
        decays = (iou >= iou_threshold) & (groups == groups.index_select(0, index))
        remaining = torch.where(decays, remaining * (1 - iou), remaining)
        remaining = remaining.index_fill(0, index, -1.0)
    if not picked:
        return candidates[:0], remaining[:0]
    kept, kept_scores = torch.cat(picked), torch.cat(picked_scores)
    is_enough = kept_scores >= min_score
    return candidates[kept[is_enough]], kept_scores[is_enough]


class SoftNMSRPN(RPN):
    """Detectron2's ``RPN``; with ``soft_nms``, proposals are tested with soft-NMS a level.

    Training is not affected. ``nms_thresh`` is the overlap from which scores decay.
    """

    def __init__(self, *args: Any, soft_nms: bool, **kwargs: Any):
        """
        Args:
            soft_nms: False for Detectron2's own behaviour.
            args, kwargs: of Detectron2's ``RPN``.
        """
        super().__init__(*args, **kwargs)
        self.soft_nms = soft_nms

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See Detectron2's. Objectness logits of the result are those of the decayed scores."""
        if self.training or not self.soft_nms:
            return super().predict_proposals(
                anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
            )
        with torch.no_grad():
            per_level = [
                find_top_rpn_proposals(
                    [boxes],
                    [logits],
                    image_sizes,
                    _NEVER,
                    self.pre_nms_topk[False],
                    self.pre_nms_topk[False],
                    self.min_box_size,
                    False,
                )
                for boxes, logits in zip(
                    self._decode_proposals(anchors, pred_anchor_deltas), pred_objectness_logits
                )
            ]
            return [self._merge_levels(levels) for levels in zip(*per_level)]

    def _merge_levels(self, levels: tuple[Instances, ...]) -> Instances:
        """The proposals of one image."""
        proposals = Instances.cat(list(levels))
        counts = torch.tensor([len(level) for level in levels])
        level_of = torch.repeat_interleave(torch.arange(len(levels)), counts)
        kept, scores = soft_nms(
            proposals.proposal_boxes.tensor,
            proposals.objectness_logits.sigmoid(),
            level_of.to(proposals.objectness_logits.device),
            iou_threshold=self.nms_thresh,
            max_kept=self.post_nms_topk[False],
        )
        proposals = proposals[kept]
        proposals.objectness_logits = scores.logit()
        return proposals


class SoftNMSFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Detectron2's ``FastRCNNOutputLayers``; with ``soft_nms``, tested with soft-NMS a class.

    ``test_nms_thresh`` is the overlap from which scores decay.
    """

    def __init__(self, *args: Any, soft_nms: bool, **kwargs: Any):
        """
        Args:
            soft_nms: False for Detectron2's own behaviour.
            args, kwargs: of Detectron2's ``FastRCNNOutputLayers``.
        """
        super().__init__(*args, **kwargs)
        self.soft_nms = soft_nms

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """See Detectron2's. Scores of the result are the decayed ones."""
        if not self.soft_nms:
            return super().inference(predictions, proposals)
        candidates, rows = fast_rcnn_inference(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [p.image_size for p in proposals],
            self.test_score_thresh,
            _NEVER,
            -1,
        )
        results, kept_rows = [], []
        for instances, row in zip(candidates, rows):
            limit = self.test_topk_per_image
            kept, scores = soft_nms(
                instances.pred_boxes.tensor,
                instances.scores,
                instances.pred_classes,
                iou_threshold=self.test_nms_thresh,
                max_kept=limit if limit >= 0 else len(instances),
            )
            instances = instances[kept]
            instances.scores = scores
            results.append(instances)
            kept_rows.append(row[kept])
        return results, kept_rows
