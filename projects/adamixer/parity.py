"""Cases of AdaMixer's query head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from adamixer import AdaMixerDecoder
from adamixer.official_names import ADAMIXER
from detection_toolkit.structures import Predictions
from detection_toolkit.training import StagewiseMatcher

from .case import Case, CaseError, Settings
from .compare import Measurement, exact, geometry, pixels, value
from .decoder import DecoderCase, Outcome, assignment, measure_gradient
from .runner import register_kind

__all__ = ["AdaMixerCase"]

_IN_DETAIL = (
    "attn_norm_out",
    "sample_xyz",
    "level_weights",
    "sampled_feats",
    "M",
    "S",
    "mixing_residual_sum",
    "mixing_out",
    "ffn_norm_out",
    "box_delta",
)


@register_kind
class AdaMixerCase(DecoderCase):
    """Forward passes with intermediate values, and training steps."""

    title = "AdaMixer"
    official_format = ADAMIXER

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "config" in case.names and "in_points" in case.json().get("summary", {})

    def build_decoder(self) -> nn.Module:
        summary = self.summary
        try:
            return AdaMixerDecoder(
                int(summary["num_classes"]),
                num_stages=self.num_stages,
                channels=int(summary["content_dim"]),
                num_heads=int(summary["attention_heads"]),
                ffn_channels=int(summary["ffn_dim"]),
                groups=int(summary["groups"]),
                points=int(summary["in_points"]),
                out_points=int(summary["out_points"]),
                execution=self.execution,
            )
        except ValueError as error:
            raise CaseError(f"{self.case.path}: {error}") from error

    def build_label_assigner(self) -> nn.Module:
        return StagewiseMatcher()

    def _is_in_detail(self, t: int) -> bool:
        return any(f"stage{t}/{x}" in self.case.names for x in _IN_DETAIL)

    def forward_names(self) -> set[str]:
        names = {"init/xyzr", "init/content", "init/imgs_whwh"} | self.detection_names()
        for t in self.stages:
            names |= {f"stage{t}/{x}" for x in ("cls_score", "xyzr", "boxes", "object_feats")}
            if self._is_in_detail(t):
                names |= {f"stage{t}/{x}" for x in _IN_DETAIL}
        return names

    def training_names(self) -> set[str]:
        per_stage = ["cls_score", "xyzr", "boxes", "labels", "reg_target", "avg_factor"]
        per_stage += ["assigned_gt", "loss_cls", "loss_bbox", "loss_iou"]
        names = {f"stage{t}/{x}" for t in self.stages for x in per_stage}
        places = [f"stage{t}/img{b}" for t in self.stages for b in self.images]
        names |= {f"{place}/cost_{x}" for place in places for x in ("total", "cls", "l1", "giou")}
        names |= {f"grad_feat/{i}/norm" for i in range(len(self.strides))}
        names |= {"total_loss", "grad_norm/names", "grad_norm/values"}
        # Gradients in full are given for some parameters and features; which is the file's choice.
        in_full = {f"grad/{x}" for x in self.parameter_names()}
        in_full |= {f"grad_feat/{i}/full" for i in range(len(self.strides))}
        return names | (in_full & self.case.names)

    def measure_forward(self, outcome: Outcome, settings: Settings) -> Iterator[Measurement]:
        atol, trace = settings.atol, outcome.trace
        yield from self.measure_queries(outcome, settings)
        for t, output in enumerate(outcome.outputs):
            if self._is_in_detail(t):
                points = trace(t, "points")
                mixing = outcome.model.decoder.stages[t].mixing
                channel, spatial = mixing.generate(trace(t, "attention"))
                xyz = torch.cat([points.xy, points.z[..., None]], dim=-1)
                for name, ours, limit in (
                    ("attn_norm_out", trace(t, "attention"), value(atol)),
                    ("sample_xyz", xyz, geometry(atol, 1)),
                    ("level_weights", trace(t, "level_weights"), value(atol)),
                    ("sampled_feats", trace(t, "sampled"), value(atol)),
                    ("M", channel, value(atol)),
                    ("S", spatial, value(atol)),
                    ("mixing_residual_sum", trace(t, "before_last_norm"), value(atol)),
                    ("mixing_out", trace(t, "mixing")[0], value(atol)),
                    ("ffn_norm_out", trace(t, "ffn"), value(atol)),
                    ("box_delta", trace(t, "delta"), value(atol)),
                ):
                    yield self.measured(f"stage{t}/{name}", ours, limit)
            predictions = ("cls_score", "xyzr", "boxes", "object_feats")
            yield from self.measure_predictions(t, output, settings, predictions)
        yield from self.measure_detections(outcome, settings)

    def measure_training(self, outcome: Outcome, settings: Settings) -> Iterator[Measurement]:
        truth = self.truth(settings)
        result = outcome.model.criterion(Predictions(outcome.outputs), truth)
        total = torch.stack([result.loss_cls, result.loss_bbox, result.loss_giou]).sum()
        total.backward()
        yield from self.measure_costs(outcome, truth, settings)
        for t, output in enumerate(outcome.outputs):
            yield from self.measure_predictions(t, output, settings, ("cls_score", "xyzr", "boxes"))
            yield self._measure_assignment(t, result.assignment.object_index[t], settings)
            index = result.assignment.object_index[t].clamp(min=0)
            matched = result.assignment.matched[t]
            own = truth.labels.gather(1, index)
            background = torch.full_like(own, int(self.summary["num_classes"]))
            labels = torch.where(matched, own, background)
            yield self.measured(f"stage{t}/labels", labels, exact())
            objects = truth.boxes.gather(1, index[..., None].expand(-1, -1, 4))
            targets = objects * matched[..., None]
            yield self.measured(f"stage{t}/reg_target", targets, pixels())
            yield from self.measure_losses(
                t,
                [
                    ("avg_factor", result.box_normalizer[t]),
                    ("loss_cls", result.loss_cls[t]),
                    ("loss_bbox", result.loss_bbox[t]),
                    ("loss_iou", result.loss_giou[t]),
                ],
            )
        yield self.measure_total(total)
        yield from self._measure_gradients(outcome)

    def _measure_assignment(self, t: int, ours: torch.Tensor, settings: Settings) -> Measurement:
        name = f"stage{t}/assigned_gt"
        reference = self.case.array(name)
        verdicts = [
            assignment(
                ours[b], reference[b], self.case.array(f"stage{t}/img{b}/cost_total"), settings.atol
            )
            for b in self.images
        ]
        same = [torch.equal(ours[b].cpu(), torch.from_numpy(reference[b])) for b in self.images]
        ties = [verdict for verdict in verdicts if verdict.startswith("ok")]
        # An image that differs without being a tie is left to the ordinary comparison.
        explained = all(s or v.startswith("ok") for s, v in zip(same, verdicts))
        settled = ties[0] if ties and explained else ""
        return Measurement(name, ours, reference, exact(), settled=settled)

    def _measure_gradients(self, outcome: Outcome) -> Iterator[Measurement]:
        gradients = self.gradients(outcome)
        listed = [str(name) for name in self.case.array("grad_norm/names")]
        norms = self.case.array("grad_norm/values")
        if sorted(listed) != sorted(gradients) or len(norms) != len(listed):
            different = sorted(set(listed) ^ set(gradients))
            raise CaseError(
                f"{self.case.path}: grad_norm/names and /values must list each parameter once; "
                f"{len(listed)} names, {len(norms)} values, {len(gradients)} parameters, "
                f"in one place only: {different[:8]}"
            )
        largest = float(norms.max(initial=0.0))
        covers = ("grad_norm/names", "grad_norm/values")
        for name, norm in zip(listed, norms):
            limit = self.gradient_limit(name, largest)
            yield measure_gradient(
                f"grad_norm/{name}",
                gradients[name],
                norm,
                limit=limit,
                is_norm=True,
                covers=covers,
            )
            quantity = f"grad/{name}"
            if quantity in self.case.names:
                reference = self.case.array(quantity)
                yield measure_gradient(
                    quantity, gradients[name], reference, limit=limit, is_norm=False
                )
        for i, feature in enumerate(outcome.features):
            for what in ("norm", "full"):
                quantity = f"grad_feat/{i}/{what}"
                if quantity in self.case.names:
                    limit = self.gradient_limit(quantity, largest)
                    yield measure_gradient(
                        quantity,
                        feature.grad,
                        self.case.array(quantity),
                        limit=limit,
                        is_norm=what == "norm",
                    )
