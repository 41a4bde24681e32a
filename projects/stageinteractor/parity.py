"""Cases of StageInteractor's query head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from detection_toolkit.structures import Predictions
from detection_toolkit.training import StagewiseMatcher
from stageinteractor import CrossStageMatcher, StageInteractorDecoder
from stageinteractor.official_names import STAGEINTERACTOR

from .case import Case, CaseError, Settings
from .compare import Measurement, exact, loss, pixels, value
from .decoder import DecoderCase, Outcome, assignment, measure_gradient
from .runner import register_kind

__all__ = ["StageInteractorCase"]

_IN_DETAIL = (
    "attn_norm_out",
    "sample_xy",
    "sample_z",
    "level_weights",
    "sampled_feats",
    "mixing_out",
    "ffn_norm_out",
)
_PREDICTIONS = ("cls_score", "xyzr", "boxes", "object_feats")


@register_kind
class StageInteractorCase(DecoderCase):
    """Forward passes with every intermediate value, and training steps."""

    title = "StageInteractor"
    official_format = STAGEINTERACTOR

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "config" in case.names and "reuse_start_stage" in case.json().get("summary", {})

    def __init__(self, case: Case):
        super().__init__(case)
        candidates = self.summary["cross_stage_candidates"]
        self.candidates = [None if c is None else list(c) for c in candidates or [None]]
        self.is_cross_stage = all(c is not None for c in self.candidates)
        if not self.is_cross_stage and any(c is not None for c in self.candidates):
            raise CaseError(
                f"{case.path}: cross_stage_candidates must be given for all stages or for none"
            )

    def build_decoder(self) -> nn.Module:
        summary = self.summary
        base, sub = summary["base_points"], summary["sub_points"]
        later = base[1] if len(base) > 1 else base[0]
        if len(set(base[1:])) > 1 or len(set(sub)) > 1:
            raise CaseError(
                f"{self.case.path}: all stages must have the same number of sub-points and all "
                f"but the first of base points, not {sub} and {base}"
            )
        spatial = int(summary["spatial_reuse"])
        if spatial not in (0, 1):
            raise CaseError(f"{self.case.path}: spatial_reuse must be 0 or 1, not {spatial}")
        try:
            return StageInteractorDecoder(
                int(summary["num_classes"]),
                num_stages=self.num_stages,
                channels=int(summary["content_dim"]),
                num_heads=int(summary["attention_heads"]),
                ffn_channels=int(summary["ffn_dim"]),
                groups=int(summary["groups"]),
                first_base_points=int(base[0]),
                base_points=int(later),
                sub_points=int(sub[0]),
                out_points=int(summary["out_points"]),
                reuse_start=int(summary["reuse_start_stage"]),
                channel_reuse_cap=summary["channel_reuse_cap"],
                apply_reused_channel_filters=not summary["no_previous_filters"],
                spatial_reuse=bool(spatial),
                execution=self.execution,
            )
        except ValueError as error:
            raise CaseError(f"{self.case.path}: {error}") from error

    def build_label_assigner(self) -> nn.Module:
        if not self.is_cross_stage:
            return StagewiseMatcher()
        return CrossStageMatcher(
            float(self.summary["iou_threshold"]), stage_offsets=self.candidates
        )

    def _newest_in_bank(self, t: int) -> int:
        """Place of the stage's own filters in the bank that it leaves."""
        return max(0, t - int(self.summary["reuse_start_stage"]) + 1)

    def _detail_names(self, t: int) -> set[str]:
        if not any(f"stage{t}/{x}" in self.case.names for x in (*_IN_DETAIL, "mix_preln0")):
            return set()
        cap = self.summary["channel_reuse_cap"]
        reused = self._newest_in_bank(t) if cap is None else min(self._newest_in_bank(t), cap)
        names = {f"stage{t}/{x}" for x in _IN_DETAIL}
        return names | {f"stage{t}/mix_preln{i}" for i in range(reused + 2)}

    def forward_names(self) -> set[str]:
        names = {"init/xyzr", "init/content", "init/imgs_whwh"} | self.detection_names()
        for t in self.stages:
            bank = f"bank{self._newest_in_bank(t)}"
            own = (*_PREDICTIONS, "box_delta", "bank_provenance", f"{bank}/M", f"{bank}/S")
            names |= {f"stage{t}/{x}" for x in own} | self._detail_names(t)
        return names

    def training_names(self) -> set[str]:
        per_stage = ["labels", "cls_score", "boxes", "loss_cls", "loss_bbox", "loss_iou", "pos_acc"]
        if self.is_cross_stage:
            per_stage += ["cls_target", "cls_weight", "avg_factor_cls", "avg_factor_reg"]
            per_stage += ["reg_pred_xyxy", "reg_target_xyxy"]
        per_image = ["assigned_gt", "cost_total", "cost_cls", "cost_l1", "cost_giou"]
        names = {f"stage{t}/{x}" for t in self.stages for x in per_stage} | {"total_loss"}
        places = [f"stage{t}/img{b}" for t in self.stages for b in self.images]
        names |= {f"{place}/{x}" for place in places for x in per_image}
        names |= {f"gradnorm_input/feat{i}" for i in range(len(self.strides))}
        names |= {f"gradnorm/{x}" for x in self.parameter_names()}
        # Gradients in full are given for small parameters; which ones is the file's choice.
        in_full = {f"grad/{x}" for x in self.parameter_names()}
        return names | (in_full & self.case.names)

    def measure_forward(self, outcome: Outcome, settings: Settings) -> Iterator[Measurement]:
        atol, trace = settings.atol, outcome.trace
        yield from self.measure_queries(outcome, settings)
        deposits: list[int] = []
        for t, output in enumerate(outcome.outputs):
            prefix = f"stage{t}/"
            if self._detail_names(t):
                points = trace(t, "points")
                for name, ours, limit in (
                    ("attn_norm_out", trace(t, "attention"), value(atol)),
                    ("sample_xy", points.xy, pixels()),
                    ("sample_z", points.z, value(atol)),
                    ("level_weights", trace(t, "level_weights"), value(atol)),
                    ("sampled_feats", trace(t, "sampled"), value(atol)),
                ):
                    yield self.measured(prefix + name, ours, limit)
                for i, before_norm in enumerate(trace.all(t, "before_norm")):
                    yield self.measured(f"{prefix}mix_preln{i}", before_norm, value(atol))
                yield self.measured(prefix + "mixing_out", trace(t, "mixing")[0], value(atol))
                yield self.measured(prefix + "ffn_norm_out", trace(t, "ffn"), value(atol))
            yield self.measured(prefix + "box_delta", trace(t, "delta"), value(atol))
            yield from self.measure_predictions(t, output, settings, _PREDICTIONS)
            entries = trace(t, "stage")[1].entries
            deposits.append(id(entries[-1]))
            origin = torch.tensor([deposits.index(id(entry)) for entry in entries])
            yield self.measured(prefix + "bank_provenance", origin, exact())
            bank = f"{prefix}bank{len(entries) - 1}/"
            yield self.measured(bank + "M", entries[-1].channel, value(atol))
            yield self.measured(bank + "S", entries[-1].spatial, value(atol))
        yield from self.measure_detections(outcome, settings)

    def measure_training(self, outcome: Outcome, settings: Settings) -> Iterator[Measurement]:
        truth = self.truth(settings)
        result = outcome.model.criterion(Predictions(outcome.outputs), truth)
        total = torch.stack([result.loss_cls, result.loss_bbox, result.loss_giou]).sum()
        total.backward()
        yield from self.measure_costs(outcome, truth, settings)
        index = result.assignment.object_index
        matched = result.assignment.matched
        for t, output in enumerate(outcome.outputs):
            prefix = f"stage{t}/"
            for b in self.images:
                name = f"{prefix}img{b}/assigned_gt"
                reference = self.case.array(name)
                cost = self.case.array(f"{prefix}img{b}/cost_total")
                verdict = assignment(index[t, b], reference, cost, settings.atol)
                yield Measurement(name, index[t, b], reference, exact(), settled=verdict)
            own = truth.labels.gather(1, index[t].clamp(min=0))
            background = int(self.summary["num_classes"])
            labels = torch.where(matched[t], own, torch.full_like(own, background))
            yield self.measured(prefix + "labels", labels, exact())
            yield from self.measure_predictions(t, output, settings, ("cls_score", "boxes"))
            if self.is_cross_stage:
                targets = result.class_targets.multi_hot[t]
                yield self.measured(prefix + "cls_target", targets, exact())
                # Every query weighs the same in our loss.
                yield self.measured(prefix + "cls_weight", torch.ones(labels.shape), exact())
                objects = truth.boxes.gather(1, index[t].clamp(min=0)[..., None].expand(-1, -1, 4))
                yield self.measured(prefix + "reg_pred_xyxy", output.boxes[matched[t]], pixels())
                yield self.measured(prefix + "reg_target_xyxy", objects[matched[t]], pixels())
                yield from self.measure_losses(
                    t,
                    [
                        ("avg_factor_cls", result.cls_normalizer[t]),
                        ("avg_factor_reg", result.box_normalizer[t]),
                    ],
                )
            yield from self.measure_losses(
                t,
                [
                    ("loss_cls", result.loss_cls[t]),
                    ("loss_bbox", result.loss_bbox[t]),
                    ("loss_iou", result.loss_giou[t]),
                ],
            )
            yield self.measured(prefix + "pos_acc", result.matched_accuracy[t], loss())
        yield self.measure_total(total)
        yield from self._measure_gradients(outcome)

    def _measure_gradients(self, outcome: Outcome) -> Iterator[Measurement]:
        gradients = self.gradients(outcome)
        norms = [float(self.case.array(f"gradnorm/{name}")) for name in gradients]
        largest = max(norms, default=0.0)
        for name, ours in gradients.items():
            limit = self.gradient_limit(name, largest)
            for quantity, is_norm in ((f"gradnorm/{name}", True), (f"grad/{name}", False)):
                if quantity in self.case.names:
                    yield measure_gradient(
                        quantity, ours, self.case.array(quantity), limit=limit, is_norm=is_norm
                    )
        for i, feature in enumerate(outcome.features):
            quantity = f"gradnorm_input/feat{i}"
            limit = self.gradient_limit(quantity, largest)
            yield measure_gradient(
                quantity, feature.grad, self.case.array(quantity), limit=limit, is_norm=True
            )
