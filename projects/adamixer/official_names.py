"""Names of the released checkpoints, which those that SQR trained have as well."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from detection_toolkit.checkpoint.official_format import (
    COCO_CLASSES,
    OfficialFormat,
    register_official_format,
)
from stageinteractor.official_names import (
    RESIZABLE,
    check_query_boxes,
    shared_rules,
    stage_rules,
    whole_image_boxes,
)

__all__ = ["ADAMIXER"]


def _initial_unused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The query boxes are a parameter that no gradient reaches: the constant (0.5, 0.5, 1, 1)."""
    return {"rpn_head.init_proposal_bboxes.weight": whole_image_boxes(weights)}


ADAMIXER = OfficialFormat(
    "AdaMixer",
    [
        *shared_rules(),
        *stage_rules(
            [
                ("sampling_n_mixing.sampling_offset_generator.0.*", "sampling.offset.*"),
                (
                    "sampling_n_mixing.adaptive_mixing.parameter_generator.0.*",
                    "mixing.filter_generator.*",
                ),
                ("sampling_n_mixing.adaptive_mixing.out_proj.*", "mixing.out_proj.*"),
                ("sampling_n_mixing.norm.*", "mixing.norm.*"),
            ]
        ),
    ],
    mark=r"roi_head\.bbox_head\.\d+\.sampling_n_mixing\..*",
    our_mark=r"decoder\.stages\.\d+\.sampling\.offset\..*",
    unused=["rpn_head.init_proposal_bboxes.weight"],
    initial_unused=_initial_unused,
    resizable=RESIZABLE,
    classes=COCO_CLASSES,
    check_extras=check_query_boxes,
)
register_official_format(ADAMIXER)
