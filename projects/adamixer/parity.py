"""Numeric cases of AdaMixer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detection_toolkit.parity import CASE_KINDS, Case, Quantity, Settings, expand
from detection_toolkit.parity.compare import NORMALIZER, PIXELS, Table, geometry, value
from detection_toolkit.parity.detector import same_matches
from stageinteractor.parity import (
    BOX_DELTA,
    LABELS,
    LOSSES,
    ON_THE_WAY,
    PREDICTIONS,
    SIZES,
    FeaturesCase,
)

from .decoder import AdaMixerDecoder
from .official_names import ADAMIXER

__all__ = ["AdaMixerCase"]


def _points(run: Any, t: int) -> Tensor:
    points = run.trace[t, "points"]
    return torch.cat([points.xy, points.z[..., None]], dim=-1)


def _filters(run: Any, t: int) -> tuple[Tensor, Tensor]:
    return run.model.decoder.stages[t].mixing.generate(run.trace[t, "attention"])


_IN_DETAIL: Table = {
    **ON_THE_WAY,
    **BOX_DELTA,
    "sample_xyz": (partial(geometry, logarithms=1), _points),
    "M": (value, lambda run, t: _filters(run, t)[0]),
    "S": (value, lambda run, t: _filters(run, t)[1]),
    "mixing_residual_sum": (value, lambda run, t: run.trace[t, "before_last_norm"]),
}
_BOX_TARGETS: Table = {
    "reg_target": (PIXELS, lambda run, t: run.boxes[t]),
    "avg_factor": (NORMALIZER, lambda run, t: run.losses.box_normalizer[t]),
}


@CASE_KINDS.register()
class AdaMixerCase(FeaturesCase):
    """Forward passes with intermediate values, and training steps."""

    title = "AdaMixer"
    official_format = ADAMIXER

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "config" in case.names and "in_points" in case.config().get("summary", {})

    def __init__(self, case: Case):
        super().__init__(case)
        if self.is_training:
            case.unpack("grad_norm/names", "grad_norm/values", "grad_norm/")

    def build_decoder(self, settings: Settings) -> nn.Module:
        sizes = self.summary.integers({**SIZES, "points": "in_points"})
        return AdaMixerDecoder(**sizes, execution=settings.execution)

    def forward_stage(self, t: int) -> Iterator[Quantity]:
        if self.has_any(t, _IN_DETAIL):
            yield from expand(_IN_DETAIL, f"stage{t}/", t)
        yield from expand(PREDICTIONS, f"stage{t}/", t)

    def training_stage(self, t: int) -> Iterator[Quantity]:
        stage = f"stage{t}/"
        predictions = {name: PREDICTIONS[name] for name in ("cls_score", "xyzr", "boxes")}
        costs = [f"{stage}img{b}/cost_total" for b in self.images]
        limit = partial(same_matches, self.case, costs)
        matches: Table = {"assigned_gt": (limit, lambda run, t: run.index[t])}
        for table in (predictions, matches, LABELS, _BOX_TARGETS, LOSSES):
            yield from expand(table, stage, t)

    def training_gradients(self) -> Iterator[Quantity]:
        return self.compare_gradients(
            "grad_norm/",
            "grad/",
            norm_of_map="grad_feat/{}/norm",
            full_of_map="grad_feat/{}/full",
        )
