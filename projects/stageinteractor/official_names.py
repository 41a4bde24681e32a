"""Names of the released checkpoints; the parts that AdaMixer's share stand by themselves."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detection_toolkit.checkpoint.name_rules import Rule, resnet_rules, swin_rules
from detection_toolkit.checkpoint.official_format import (
    COCO_CLASSES,
    OfficialFormat,
    register_official_format,
)

__all__ = [
    "RESIZABLE",
    "STAGEINTERACTOR",
    "check_query_boxes",
    "shared_rules",
    "stage_rules",
    "whole_image_boxes",
]

logger = logging.getLogger(__name__)

RESIZABLE = r"decoder\.stages\.\d+\.class_tower\.out\..*|initial_queries\.content\.weight"
"""Our names of what depends on the number of classes or of queries alone."""


def shared_rules() -> list[Rule]:
    """Everything around sampling and mixing, which the detectors of the family share."""
    official, ours = "roi_head.bbox_head.{t}.", "decoder.stages.{t}."
    head = [
        ("iof_tau", "attention.tau"),
        ("attention.attn.*", "attention.attention.*"),
        ("attention_norm.*", "attention.norm.*"),
        ("ffn.layers.0.0.*", "ffn.linear1.*"),
        ("ffn.layers.1.*", "ffn.linear2.*"),
        ("ffn_norm.*", "ffn.norm.*"),
        ("cls_fcs.0.*", "class_tower.hidden.*"),
        ("cls_fcs.1.*", "class_tower.norm.*"),
        ("fc_cls.*", "class_tower.out.*"),
        ("reg_fcs.0.*", "box_tower.hidden.*"),
        ("reg_fcs.1.*", "box_tower.norm.*"),
        ("fc_reg.*", "box_tower.out.*"),
    ]
    return [
        *resnet_rules(),
        *swin_rules(),
        Rule("neck.lateral_convs.{l}.conv.*", "backbone.projections.{l}.*"),
        Rule("neck.gn_out.*", "backbone.norm.*"),
        Rule("rpn_head.init_content_features.weight", "initial_queries.content.weight"),
        *(Rule(official + a, ours + b) for a, b in head),
    ]


def stage_rules(pairs: Sequence[tuple[str, str]]) -> list[Rule]:
    """Pairs of names within a stage."""
    return [
        Rule("roi_head.bbox_head.{t}." + official, "decoder.stages.{t}." + ours)
        for official, ours in pairs
    ]


def whole_image_boxes(weights: Mapping[str, Tensor]) -> Tensor:
    """(N, 4) cxcywh, as shares of the image, of N queries that begin with all of it."""
    content = weights["initial_queries.content.weight"]
    return content.new_tensor([0.5, 0.5, 1.0, 1.0]).repeat(len(content), 1)


def check_query_boxes(weights: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> None:
    """Warn if the official query boxes, which have no place here, are not the whole image."""
    for key, boxes in extras.items():
        if "init_proposal_bboxes" not in key or boxes.is_meta:
            continue
        expected = whole_image_boxes(weights)
        if boxes.shape != expected.shape or (boxes != expected).any():
            logger.warning(
                "%s is not the whole image for every query, as it is in all official weights. "
                "Queries begin with the whole image here, so detections will differ",
                key,
            )


def _stages(weights: Mapping[str, Tensor]) -> list[int]:
    pattern = re.compile(r"decoder\.stages\.(\d+)\.attention\.tau")
    return sorted(int(m.group(1)) for m in map(pattern.fullmatch, weights) if m)


def _initial_unused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The query boxes are the constant (0.5, 0.5, 1, 1); the score layers start at zero, and the
    statistics as those of any fresh batch norm (mean 0, variance 1, no batch seen)."""
    unused = {"rpn_head.init_proposal_bboxes": whole_image_boxes(weights)}
    channels = weights["initial_queries.content.weight"].shape[1]
    for t in _stages(weights):
        official, ours = f"roi_head.bbox_head.{t}.", f"decoder.stages.{t}."
        statistics = official + "iou_snyc_statistics."
        unused[statistics + "running_mean"] = torch.zeros(1)
        unused[statistics + "running_var"] = torch.ones(1)
        unused[statistics + "num_batches_tracked"] = torch.tensor(0)
        base = len(weights[ours + "sampling.base_offset.bias"]) // 3  # groups x base points
        sub = len(weights[ours + "sampling.sub_offset.bias"]) // 3
        reused = 0
        while f"{ours}mixing.static_mixing.{reused}.across_base_points.bias" in weights:
            scores = f"{official}dynamic_conv.subbox_score_list.{reused}."
            unused[scores + "weight"] = torch.zeros(base * sub, channels)
            unused[scores + "bias"] = torch.zeros(base * sub)
            reused += 1
    return unused


STAGEINTERACTOR = OfficialFormat(
    "StageInteractor",
    [
        *shared_rules(),
        *stage_rules(
            [
                ("feat_extractor.gen_one_d.0.*", "sampling.base_offset.*"),
                ("feat_extractor.gen_double_d.0.*", "sampling.sub_offset.*"),
                ("dynamic_conv.parameter_generator.*", "mixing.filter_generator.*"),
                ("dynamic_conv.mix_bias.*", "mixing.bias_generator.*"),
                ("dynamic_conv.Wv.*", "mixing.out_proj.*"),
                ("dynamic_conv.Wv_layer_norm.*", "mixing.norm.*"),
                (
                    "dynamic_conv.subbox_local_list.{j}.*",
                    "mixing.static_mixing.{j}.across_sub_points.*",
                ),
                (
                    "dynamic_conv.axis_atten_list.{j}.*",
                    "mixing.static_mixing.{j}.across_base_points.*",
                ),
                ("dynamic_conv.M_score_list.*", "mixing.channel_adapter.gates.*"),
                ("dynamic_conv.M_score_list_mix_bias.*", "mixing.channel_adapter.bias.*"),
                ("dynamic_conv.S_score_list.*", "mixing.spatial_adapter.filter_gates.*"),
                ("dynamic_conv.S_score_list2.*", "mixing.spatial_adapter.point_gates.*"),
            ]
        ),
    ],
    mark=r"roi_head\.bbox_head\.\d+\.(dynamic_conv|feat_extractor)\..*",
    our_mark=r"decoder\.stages\.\d+\.sampling\.(base|sub)_offset\..*",
    unused=[
        "rpn_head.init_proposal_bboxes",
        "roi_head.bbox_head.{t}.iou_snyc_statistics.*",
        "roi_head.bbox_head.{t}.dynamic_conv.subbox_score_list.{j}.*",
    ],
    initial_unused=_initial_unused,
    resizable=RESIZABLE,
    classes=COCO_CLASSES,
    check_extras=check_query_boxes,
)
register_official_format(STAGEINTERACTOR)
