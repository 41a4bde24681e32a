"""Names of the authors' checkpoints: those of MMDetection's DINO, and of what HPR adds to it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from detection_toolkit.checkpoint.name_rules import Rule
from detection_toolkit.checkpoint.official_format import register_official_format
from dino.official_names import (
    MM_FFN,
    DINOWeights,
    Origin,
    Pairs,
    below,
    mm_layer,
    mmdetection_rules,
)

from .decoder import DYNAMIC, REGIONAL

__all__ = ["HPR_WEIGHTS", "HPRWeights", "hybrid_pairs", "mm_layer_pairs"]

_DYNAMIC = [
    ("dynamic_layer.*", "filters.*"),
    ("norm_in.*", "norm1.*"),
    ("norm_out.*", "norm2.*"),
    ("fc_layer.*", "out.*"),
    ("fc_norm.*", "out_norm.*"),
]
_REGIONAL = [
    ("sample_proj.*", "samples.*"),
    ("attn.*", "attention.*"),
    ("fc_layer.*", "out.*"),
    ("fc_norm.*", "out_norm.*"),
]


def _refiner(prefix: str, name: str) -> Pairs:
    """Of the parts that all refiners have."""
    pairs = [
        ("_self_attn.attn.*", "self_attention.attention.*"),
        ("_norms.0.*", "self_attention.norm.*"),
        ("_norms.1.*", "norm.*"),
        *below("_ffn.", "", MM_FFN),
        ("_norms.2.*", "ffn.norm.*"),
    ]
    return below(prefix, f"auxiliary.{name}.", pairs)


def hybrid_layer_pairs() -> Pairs:
    """Of a hybrid layer, beside those of a plain one."""
    return [
        ("merger_SA.weights", "merge_attended.weights"),
        ("merger_FFN.weights", "merge_refined.weights"),
        *_refiner("dyconv", DYNAMIC),
        *below("dy_conv.", f"auxiliary.{DYNAMIC}.look.", _DYNAMIC),
        *_refiner("ca", REGIONAL),
        *below("regional_ca.", f"auxiliary.{REGIONAL}.look.", _REGIONAL),
    ]


def mm_layer_pairs() -> Pairs:
    """Of a hybrid layer, all."""
    plain = mm_layer("self_attn", "cross_attn", "ffn", of_decoder=True)
    return [*plain, *hybrid_layer_pairs()]


def hybrid_pairs() -> Pairs:
    """Of hybrid layers and auxiliary heads, beside those of the base."""
    pairs = below("decoder.layers.{t}.", "decoder.stages.{t}.", hybrid_layer_pairs())
    for i, name in enumerate((REGIONAL, DYNAMIC)):
        heads = f"decoder.auxiliary_heads.{name}.{{t}}."
        pairs += [
            (f"decoder.norm_aux.{i}.*", f"decoder.auxiliary_norms.{name}.*"),
            (f"bbox_head_aux.{i}.cls_branches.{{t}}.*", heads + "classes.*"),
            (f"bbox_head_aux.{i}.reg_branches.{{t}}.*", heads + "box.*"),
        ]
    return pairs


def _hpr(projections: int, stages: int) -> list[Rule]:
    return [*mmdetection_rules(projections, stages), *(Rule(*pair) for pair in hybrid_pairs())]


class HPRWeights(DINOWeights):
    """Weights of HPR on DINO and on the improved Deformable DETR."""

    name = "HPR"
    sources = ()
    configs = "hpr/"
    origins = (
        Origin(
            "",
            "the authors' HPR",
            r"decoder\.layers\.\d+\.merger_SA\.weights",
            _hpr,
            settings={"model.decoder.prediction_eps": 1e-5},
        ),
    )

    def describes(self, names: Iterable[str]) -> bool:
        return any(name.startswith("decoder.auxiliary_heads.") for name in names)

    def origin_for(self, model: nn.Module, source: str) -> Origin:
        return self.origins[0]


HPR_WEIGHTS = HPRWeights()
register_official_format(HPR_WEIGHTS)
