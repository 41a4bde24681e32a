"""Names of MMDetection 3's checkpoints of DDQ, beside those that they share with its DINO."""

from __future__ import annotations

from detection_toolkit.checkpoint.name_rules import Rule, resnet_rules, swin_rules
from dino.official_names import (
    FINE_POSITIONS,
    Origin,
    add_origin,
    box_pairs,
    mmdetection_pairs,
    rules_of,
)

__all__ = ["DENSE_ALIASES", "dense_pairs", "query_pairs"]

Pairs = list[tuple[str, str]]

DENSE_ALIASES = (("decoder.aux_reg_branches.", "bbox_head.aux_reg_branches."),)
"""The decoder lists the dense heads' boxes once more, after the first step of training."""


def dense_pairs(stages: int, official: str = "bbox_head", ours: str = "dense_head") -> Pairs:
    """Heads of the dense queries of S stages."""
    pairs = []
    for t in range(stages):
        begin = f"decoder.stages.{t}.{ours}."
        pairs.append((f"{official}.aux_cls_branches.{t}.*", begin + "classes.*"))
        pairs += box_pairs(f"{official}.aux_reg_branches.{t}", begin + "box", step=2)
    return pairs


def query_pairs(stages: int) -> Pairs:
    """What the queries are made with: the heads of the proposals follow those of S stages."""
    official, ours = "bbox_head.{}_branches." + str(stages + 1), "initial_queries.dense_head."
    return [
        ("query_map.*", "initial_queries.content.*"),
        (official.format("cls") + ".*", ours + "classes.*"),
        *box_pairs(official.format("reg"), ours + "box", step=2),
    ]


def _rules(projections: int, stages: int) -> list[Rule]:
    pairs = [
        *mmdetection_pairs(projections, stages),
        *dense_pairs(stages),
        *query_pairs(stages),
    ]
    return [*resnet_rules(), *swin_rules(), *rules_of(pairs)]


add_origin(
    Origin(
        "mmdetection3",
        "MMDetection's DDQ",
        r"query_map\.weight",
        _rules,
        settings={**FINE_POSITIONS, "model.decoder.prediction_eps": 1e-5},
        ours=r"initial_queries\.dense_head\..*",
        aliases=DENSE_ALIASES,
    )
)
