"""Names of the authors' checkpoints of HPR on DDQ."""

from __future__ import annotations

from collections.abc import Iterable

from ddq.official_names import DENSE_ALIASES, dense_pairs, query_pairs
from detection_toolkit.checkpoint.name_rules import Rule
from detection_toolkit.checkpoint.official_format import register_official_format
from dino.official_names import Origin, mmdetection_rules

from .decoder import DYNAMIC, REGIONAL
from .official_names import HPRWeights, hybrid_pairs

__all__ = ["HPR_DDQ_WEIGHTS", "HPRDDQWeights"]


def _hpr_ddq(projections: int, stages: int) -> list[Rule]:
    pairs = [*query_pairs(stages), *hybrid_pairs()]
    for i, name in enumerate((REGIONAL, DYNAMIC)):
        pairs += dense_pairs(f"bbox_head_aux.{i}", f"decoder.auxiliary_dense_heads.{name}")
    return mmdetection_rules(projections, stages, pairs)


class HPRDDQWeights(HPRWeights):
    """Weights of HPR on DDQ."""

    name = "HPR on DDQ"
    origins = (
        Origin(
            "",
            "the authors' HPR on DDQ",
            r"bbox_head_aux\.0\.aux_cls_branches\.\d+\.weight",
            _hpr_ddq,
            settings={"model.decoder.prediction_eps": 1e-5},
            aliases=DENSE_ALIASES,
        ),
    )

    def describes(self, names: Iterable[str]) -> bool:
        return any(name.startswith("decoder.auxiliary_dense_heads.") for name in names)


HPR_DDQ_WEIGHTS = HPRDDQWeights()
register_official_format(HPR_DDQ_WEIGHTS)
