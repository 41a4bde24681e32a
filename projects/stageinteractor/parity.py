"""Numeric cases of StageInteractor, and what those of its relatives share with them.

Letters: B images, N queries, S stages, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import QueryDetector
from detection_toolkit.parity import (
    CASE_KINDS,
    Case,
    CaseError,
    CaseKind,
    Inputs,
    Quantity,
    Settings,
    expand,
)
from detection_toolkit.parity.compare import (
    EXACT,
    LOSS,
    NORMALIZER,
    PIXELS,
    Table,
    geometry,
    of_part,
    value,
)
from detection_toolkit.parity.detector import (
    CaseFeatures,
    QueryCase,
    Run,
    Trace,
    read_truth,
    same_matches,
    supervise,
)
from detection_toolkit.structures import HeadOutput, Predictions
from detection_toolkit.training import Criterion, HungarianMatcher, StagewiseMatcher

from .cross_stage_matcher import CrossStageMatcher
from .decoder import StageInteractorDecoder
from .detector import StageInteractor
from .official_names import STAGEINTERACTOR
from .queries import InitialQueries

__all__ = ["CrossStageCase", "FeaturesCase", "StageInteractorCase"]


def _of_objects(term: str) -> Any:
    def ours(run: Run, t: int, b: int) -> Tensor:
        return getattr(run.cost, term)[t, b, :, : run.truth.num_objects[b]]

    return ours


def _bank(run: Run, t: int) -> Any:
    """Entries of the filter bank that stage t leaves."""
    return run.trace[t, "stage"][1].entries


def _bank_origin(run: Run, t: int) -> Tensor:
    """The stage that each of these comes from."""
    deposited = [id(_bank(run, s)[-1]) for s in range(t + 1)]
    return torch.tensor([deposited.index(id(entry)) for entry in _bank(run, t)])


def _matched(run: Run, t: int, boxes: Tensor) -> Tensor:
    """Rows of (B, N, 4) that belong to matched queries of stage t."""
    return boxes[run.index[t] >= 0]


# The tables: name of an array -> its limit, and what it is here.

PREDICTIONS: Table = {
    "cls_score": (value, lambda run, t: run.outputs[t].logits),
    "xyzr": (geometry, lambda run, t: run.outputs[t].queries.geometry),
    "boxes": (PIXELS, lambda run, t: run.outputs[t].boxes),
    "object_feats": (value, lambda run, t: run.outputs[t].queries.content),
}
ON_THE_WAY: Table = {
    "attn_norm_out": (value, lambda run, t: run.trace[t, "attention"]),
    "level_weights": (value, lambda run, t: run.trace[t, "level_weights"]),
    "sampled_feats": (value, lambda run, t: run.trace[t, "sampled"]),
    "mixing_out": (value, lambda run, t: run.trace[t, "mixing"][0]),
    "ffn_norm_out": (value, lambda run, t: run.trace[t, "ffn"]),
}
BOX_DELTA: Table = {"box_delta": (value, lambda run, t: run.trace[t, "box_tower"])}
DETECTIONS: Table = {
    "scores": (value, lambda run, b: run.detections[b][0]),
    "labels": (EXACT, lambda run, b: run.detections[b][1]),
    "boxes": (PIXELS, lambda run, b: run.detections[b][2]),
}
COSTS: Table = {
    "cost_total": (value, _of_objects("total")),
    "cost_cls": (value, _of_objects("classification")),
    "cost_l1": (value, _of_objects("l1")),
    "cost_giou": (value, _of_objects("giou")),
}
LABELS: Table = {"labels": (EXACT, lambda run, t: run.labels[t])}
LOSSES: Table = {
    "loss_cls": (LOSS, lambda run, t: run.losses.loss_cls[t]),
    "loss_bbox": (LOSS, lambda run, t: run.losses.loss_bbox[t]),
    "loss_iou": (LOSS, lambda run, t: run.losses.loss_giou[t]),
}
TOTAL: Table = {"total_loss": (LOSS, lambda run: run.total)}

_SAMPLING_POINTS: Table = {
    "sample_xy": (PIXELS, lambda run, t: run.trace[t, "points"].xy),
    "sample_z": (value, lambda run, t: run.trace[t, "points"].z),
}
_ORIGIN: Table = {"bank_provenance": (EXACT, lambda run, t: _bank_origin(run, t))}
_NEWEST_IN_BANK: Table = {
    "M": (value, lambda run, t: _bank(run, t)[-1].channel),
    "S": (value, lambda run, t: _bank(run, t)[-1].spatial),
}
_CLASS_TARGETS: Table = {
    "cls_target": (EXACT, lambda run, t: run.losses.class_targets.multi_hot[t]),
    "avg_factor_cls": (NORMALIZER, lambda run, t: run.losses.cls_normalizer[t]),
    "avg_factor_reg": (NORMALIZER, lambda run, t: run.losses.box_normalizer[t]),
}
_OF_MATCHED: Table = {
    # Every query weighs the same in our loss.
    "cls_weight": (EXACT, lambda run, t: torch.ones(run.labels[t].shape)),
    "reg_pred_xyxy": (PIXELS, lambda run, t: _matched(run, t, run.outputs[t].boxes)),
    "reg_target_xyxy": (PIXELS, lambda run, t: _matched(run, t, run.boxes[t])),
}
_ACCURACY: Table = {"pos_acc": (LOSS, lambda run, t: run.losses.matched_accuracy[t])}

# Argument of a decoder -> entry of a case's config.
SIZES = {
    "num_classes": "num_classes",
    "num_stages": "num_stages",
    "channels": "content_dim",
    "num_heads": "attention_heads",
    "ffn_channels": "ffn_dim",
    "groups": "groups",
    "out_points": "out_points",
}

# The inputs of these parameters reach log 1e-7, so that their gradients are less certain.
LESS_CERTAIN = {"iof_tau": 1e-2}


class FeaturesCase(QueryCase):
    """A query head that refines xyzr on given features: a forward pass, or a training step."""

    sizes_name = "image_sizes"
    buffers = (*QueryCase.buffers, "init_proposal_bboxes")
    less_certain = LESS_CERTAIN

    def __init__(self, case: Case):
        super().__init__(case)
        self.summary = case.config()["summary"]
        self.strides = [int(x) for x in self.summary["strides"]]
        self.map_names = [f"feat/{i}" for i in range(len(self.strides))]
        self.stages = range(int(self.summary["num_stages"]))

    @abstractmethod
    def build_decoder(self, settings: Settings) -> nn.Module:
        """The query head that the case's config describes."""

    def build_label_assigner(self) -> nn.Module:
        """How class targets are made."""
        return StagewiseMatcher()

    @abstractmethod
    def forward_stage(self, t: int) -> Iterator[Quantity]:
        """What a stage of a forward pass is compared with."""

    @abstractmethod
    def training_stage(self, t: int) -> Iterator[Quantity]:
        """What a stage of a training step is compared with, but for its costs."""

    @abstractmethod
    def training_gradients(self) -> Iterator[Quantity]:
        """The gradients."""

    def quantities(self) -> Iterator[Quantity]:
        if self.is_training:
            for t in self.stages:
                for b in self.images:
                    yield from expand(COSTS, f"stage{t}/img{b}/", t, b)
            for t in self.stages:
                yield from self.training_stage(t)
            yield from expand(TOTAL)
            yield from self.training_gradients()
            return
        yield from expand(
            {
                "content": (
                    value,
                    lambda run: run.model.initial_queries(self.sized_maps()).content,
                ),
                "xyzr": (
                    geometry,
                    lambda run: run.model.initial_queries(self.sized_maps()).geometry,
                ),
                "imgs_whwh": (EXACT, lambda run: self.sizes_whwh()),
            },
            "init/",
        )
        for t in self.stages:
            yield from self.forward_stage(t)
        for b in self.images:
            yield from expand(DETECTIONS, f"det/{b}/", b)

    def has_any(self, t: int, *tables: Table) -> bool:
        """Whether the case shows this stage in detail."""
        return any(f"stage{t}/{name}" in self.case.names for table in tables for name in table)

    def compute(self, settings: Settings) -> Run:
        inputs = Inputs(self.case, settings)
        features = [inputs.tensor(name) for name in self.map_names]
        sizes = self.summary.integers({"num_queries": "num_queries", "channels": "content_dim"})
        parts = detector_parts(
            settings,
            num_classes=int(self.summary["num_classes"]),
            decoder=self.build_decoder(settings),
            label_assigner=self.build_label_assigner(),
        )
        model = StageInteractor(
            backbone=CaseFeatures(features, self.strides),
            initial_queries=InitialQueries(**sizes),
            max_detections=int(self.summary["max_per_img"]),
            **parts,
        )
        self.load_weights(model, inputs.weights(self.weights))
        model.to(settings.device, settings.dtype).eval()
        if self.is_training:
            return self.train(model, features, settings)
        names = [[f"det/{b}/{x}" for x in DETECTIONS] for b in self.images]
        return self.infer(model, features, [[self.case.array(x) for x in of] for of in names])

    def trace(self, model: QueryDetector) -> Trace:
        """By stage and part."""
        trace = Trace()
        for t, stage in enumerate(model.decoder.stages):
            trace.output((t, "stage"), stage)
            for name in ("attention", "mixing", "ffn", "box_tower"):
                trace.output((t, name), getattr(stage, name))
            for norm in (stage.mixing.channel_norm, stage.mixing.spatial_norm):
                trace.input((t, "before_norm"), norm)
            trace.input((t, "before_last_norm"), stage.mixing.norm)
            stage.sampling.register_forward_hook(partial(_keep_sampling, trace, t))
        return trace


def detector_parts(
    settings: Settings, *, num_classes: int, decoder: nn.Module, label_assigner: nn.Module
) -> dict[str, Any]:
    """Arguments of a detector: query head and criterion, and what goes with them."""
    criterion: nn.Module = Criterion(
        num_classes=num_classes, matcher=HungarianMatcher(), label_assigner=label_assigner
    )
    if settings.replace_parts is not None:
        decoder, criterion = map(settings.replace_parts, (decoder, criterion))
    return dict(
        num_classes=num_classes,
        decoder=decoder,
        criterion=criterion,
        execution=settings.execution,
    )


def _keep_sampling(trace: Trace, t: int, module: Any, inputs: tuple, output: Tensor) -> None:
    points = module.points(*inputs[:2])
    trace.keep((t, "points"), points)
    trace.keep((t, "level_weights"), module.level_weights(points.z, inputs[2].strides))
    trace.keep((t, "sampled"), output)


@CASE_KINDS.register()
class StageInteractorCase(FeaturesCase):
    """Forward passes with every intermediate value, and training steps."""

    title = "StageInteractor"
    official_format = STAGEINTERACTOR

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "config" in case.names and "reuse_start_stage" in case.config().get("summary", {})

    def __init__(self, case: Case):
        super().__init__(case)
        candidates = self.summary["cross_stage_candidates"]
        self.candidates = [None if c is None else list(c) for c in candidates or [None]]
        self.is_cross_stage = all(c is not None for c in self.candidates)
        if not self.is_cross_stage and any(c is not None for c in self.candidates):
            raise CaseError(
                f"{case.path}: cross_stage_candidates must be given for all stages or for none"
            )

    def build_decoder(self, settings: Settings) -> nn.Module:
        base, sub = self.summary["base_points"], self.summary["sub_points"]
        if len(set(base[1:])) > 1 or len(set(sub)) > 1:
            raise UserError(
                "all stages must have the same number of sub-points and all but the first of base "
                f"points, not {sub} and {base}"
            )
        spatial = int(self.summary["spatial_reuse"])
        if spatial not in (0, 1):
            raise UserError(f"spatial_reuse must be 0 or 1, not {spatial}")
        return StageInteractorDecoder(
            **self.summary.integers({**SIZES, "reuse_start": "reuse_start_stage"}),
            first_base_points=int(base[0]),
            base_points=int(base[-1]),
            sub_points=int(sub[0]),
            channel_reuse_cap=self.summary["channel_reuse_cap"],
            apply_reused_channel_filters=not self.summary["no_previous_filters"],
            spatial_reuse=bool(spatial),
            execution=settings.execution,
        )

    def build_label_assigner(self) -> nn.Module:
        if not self.is_cross_stage:
            return super().build_label_assigner()
        return CrossStageMatcher(
            float(self.summary["iou_threshold"]), stage_offsets=self.candidates
        )

    def forward_stage(self, t: int) -> Iterator[Quantity]:
        stage = f"stage{t}/"
        # Place of the stage's own filters in the bank that it leaves: so many were there before.
        place = max(0, t - int(self.summary["reuse_start_stage"]) + 1)
        cap = self.summary["channel_reuse_cap"]
        reused = place if cap is None else min(place, cap)
        norms: Table = {
            f"mix_preln{i}": (value, lambda run, t, i=i: run.trace.all((t, "before_norm"))[i])
            for i in range(reused + 2)
        }
        in_detail = (ON_THE_WAY, _SAMPLING_POINTS, norms)
        if self.has_any(t, *in_detail):
            for table in in_detail:
                yield from expand(table, stage, t)
        for table in (BOX_DELTA, PREDICTIONS, _ORIGIN):
            yield from expand(table, stage, t)
        yield from expand(_NEWEST_IN_BANK, f"{stage}bank{place}/", t)

    def training_stage(self, t: int) -> Iterator[Quantity]:
        stage = f"stage{t}/"
        for b in self.images:
            place = f"{stage}img{b}/"
            yield from expand(matches(self.case, place + "cost_total"), place, t, b)
        predictions = {name: PREDICTIONS[name] for name in ("cls_score", "boxes")}
        of_labels = (_CLASS_TARGETS, _OF_MATCHED) if self.is_cross_stage else ()
        for table in (LABELS, predictions, *of_labels, LOSSES, _ACCURACY):
            yield from expand(table, stage, t)

    def training_gradients(self) -> Iterator[Quantity]:
        return self.compare_gradients("gradnorm/", "grad/", norm_of_map="gradnorm_input/feat{}")


def matches(case: Case, cost: str) -> Table:
    """The matches of one image, whose costs are the array ``cost``."""
    limit = partial(same_matches, case, [cost])
    return {"assigned_gt": (limit, lambda run, t, b: run.index[t, b])}


@CASE_KINDS.register()
class CrossStageCase(CaseKind):
    """Matching, class targets and losses on given predictions: many small cases in one file."""

    title = "cross-stage assigner"

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "num_cases" in case.names or bool(case.below("case0/stage0/"))

    def __init__(self, case: Case):
        super().__init__(case)
        self.cases = range(int(case.array("num_cases")))
        self.information = {*CaseKind.information, *(f"case{i}/mode" for i in self.cases)}
        self.stages = [self._stages(f"case{i}/stage") for i in self.cases]
        self.image_sizes = [
            [(int(h), int(w)) for h, w in case.array(f"case{i}/image_sizes")] for i in self.cases
        ]

    def _stages(self, prefix: str) -> range:
        found = {name[len(prefix) :].split("/")[0] for name in self.case.below(prefix)}
        if not found or not all(x.isdigit() for x in found):
            raise CaseError(f"{self.case.path} lacks the stages {prefix}*")
        return range(max(map(int, found)) + 1)

    def quantities(self) -> Iterator[Quantity]:
        for i in self.cases:
            yield from of_part(i, self._quantities(i))

    def _quantities(self, i: int) -> Iterator[Quantity]:
        for t in self.stages[i]:
            stage = f"case{i}/stage{t}/"
            for b in range(len(self.image_sizes[i])):
                place = f"{stage}img{b}/"
                yield from expand(matches(self.case, place + "cost"), place, t, b)
                yield from expand({"cost": COSTS["cost_total"]}, place, t, b)
            yield from expand(_CLASS_TARGETS, stage, t)
            yield from expand(LOSSES, stage, t)

    def compute(self, settings: Settings) -> list[Run]:
        inputs = Inputs(self.case, settings)
        return [self._compute(f"case{i}/", i, inputs) for i in self.cases]

    def _compute(self, prefix: str, i: int, inputs: Inputs) -> Run:
        logits, boxes = (
            [inputs.tensor(f"{prefix}stage{t}/{name}") for t in self.stages[i]]
            for name in ("logits", "boxes")
        )
        truth = read_truth(inputs, f"{prefix}gt/", self.image_sizes[i])
        predictions = Predictions([HeadOutput(x, y) for x, y in zip(logits, boxes)])
        criterion = Criterion(
            num_classes=logits[0].shape[-1],
            matcher=HungarianMatcher(),
            label_assigner=CrossStageMatcher(),
        )
        return supervise(criterion, predictions, truth)
