"""Names of MMDetection 3's checkpoints of DDQ, beside those that they share with its DINO."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from detection_toolkit.checkpoint.name_rules import Rule
from detection_toolkit.checkpoint.official_format import register_official_format
from dino.official_names import DINOWeights, Origin, Pairs, box_pairs, mmdetection_rules

__all__ = ["DDQ_WEIGHTS", "DENSE_ALIASES", "DDQWeights", "dense_pairs", "query_pairs"]

DENSE_ALIASES = (("decoder.aux_reg_branches.", "bbox_head.aux_reg_branches."),)
"""The decoder lists the boxes of the dense heads once more after the first step of training."""


def dense_pairs(official: str, ours: str) -> Pairs:
    """Heads of the dense queries of all stages, by what their names begin with."""
    return [
        (f"{official}.aux_cls_branches.{{t}}.*", f"{ours}.{{t}}.classes.*"),
        (f"{official}.aux_reg_branches.{{t}}.*", f"{ours}.{{t}}.box.*"),
    ]


def query_pairs(stages: int) -> Pairs:
    """What the queries are made with: the heads of the proposals follow those of S stages."""
    official, ours = f"bbox_head.{{}}_branches.{stages + 1}", "initial_queries.dense_head."
    return [
        ("query_map.*", "initial_queries.content.*"),
        (official.format("cls") + ".*", ours + "classes.*"),
        *box_pairs(official.format("reg"), ours + "box", step=2),
        *dense_pairs("bbox_head", "decoder.dense_heads"),
    ]


def _ddq(projections: int, stages: int) -> list[Rule]:
    return mmdetection_rules(projections, stages, query_pairs(stages))


class DDQWeights(DINOWeights):
    """Weights of DDQ-DETR."""

    name = "DDQ"
    sources = ("mmdetection3",)
    configs = "ddq/"
    origins = (
        Origin(
            "mmdetection3",
            "MMDetection's DDQ",
            r"query_map\.weight",
            _ddq,
            settings={
                "model.encoder.position_temperature": 20,
                "model.encoder.position_offset": 0.0,
                "model.decoder.prediction_eps": 1e-5,
            },
            aliases=DENSE_ALIASES,
        ),
    )

    def describes(self, names: Iterable[str]) -> bool:
        return any(name.startswith("decoder.dense_heads.") for name in names)

    def origin_for(self, model: nn.Module, source: str) -> Origin:
        return self.origins[0]


DDQ_WEIGHTS = DDQWeights()
register_official_format(DDQ_WEIGHTS)
