"""Cases of matching, cross-stage class targets and losses on given predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from detection_toolkit.structures import GroundTruth, HeadOutput, Predictions
from detection_toolkit.training import Criterion, HungarianMatcher
from stageinteractor import CrossStageMatcher

from .case import Case, CaseError, Inputs, Settings
from .compare import Measurement, exact, loss, value
from .decoder import assignment, not_finite
from .runner import CaseKind, Layout, register_kind

__all__ = ["AssignerCase"]


@register_kind
class AssignerCase(CaseKind):
    """Many small cases in one file, each with the predictions of all stages and the objects."""

    title = "cross-stage assigner"

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "num_cases" in case.names or bool(case.below("case0/stage0/"))

    def __init__(self, case: Case):
        super().__init__(case)
        self.count = int(case.array("num_cases"))
        self.stages = [self._count_stages(i) for i in range(self.count)]
        self.image_sizes = [
            [(int(h), int(w)) for h, w in case.array(f"case{i}/image_sizes")]
            for i in range(self.count)
        ]

    def _count_stages(self, i: int) -> int:
        prefix = f"case{i}/stage"
        found = {name[len(prefix) :].split("/")[0] for name in self.case.below(prefix)}
        if not found or not all(x.isdigit() for x in found):
            raise CaseError(f"{self.case.path} lacks the stages of case {i} ({prefix}*)")
        return max(map(int, found)) + 1

    def layout(self) -> Layout:
        inputs, compared, information = {"num_cases"}, set(), set()
        for i in range(self.count):
            prefix = f"case{i}/"
            inputs.add(prefix + "image_sizes")
            information.add(prefix + "mode")
            images = range(len(self.image_sizes[i]))
            inputs |= {f"{prefix}gt/{b}/{x}" for b in images for x in ("boxes", "labels")}
            for t in range(self.stages[i]):
                stage = f"{prefix}stage{t}/"
                inputs |= {stage + "boxes", stage + "logits"}
                compared |= {stage + x for x in ("cls_target", "avg_factor_cls", "avg_factor_reg")}
                compared |= {stage + x for x in ("loss_cls", "loss_bbox", "loss_iou")}
                compared |= {f"{stage}img{b}/{x}" for b in images for x in ("assigned_gt", "cost")}
        return Layout(inputs, compared, information)

    def measure(self, settings: Settings) -> Iterator[Measurement]:
        inputs = Inputs(self.case, settings)
        for i in range(self.count):
            yield from self._measure_one(i, inputs, settings)

    def _measure_one(self, i: int, inputs: Inputs, settings: Settings) -> Iterator[Measurement]:
        prefix = f"case{i}/"
        stages, sizes = range(self.stages[i]), self.image_sizes[i]
        logits = [inputs.tensor(f"{prefix}stage{t}/logits") for t in stages]
        boxes = [inputs.tensor(f"{prefix}stage{t}/boxes") for t in stages]
        truth = GroundTruth.collate(
            [inputs.tensor(f"{prefix}gt/{b}/boxes", exact=True) for b in range(len(sizes))],
            [inputs.tensor(f"{prefix}gt/{b}/labels") for b in range(len(sizes))],
            sizes,
        )
        outputs = [HeadOutput(x, y) for x, y in zip(logits, boxes)]
        criterion = Criterion(
            num_classes=logits[0].shape[-1],
            matcher=HungarianMatcher(),
            label_assigner=CrossStageMatcher(),
        )
        result = criterion(Predictions(outputs), truth)
        cost = criterion.matcher.cost(torch.stack(logits), torch.stack(boxes), truth)
        for t in stages:
            stage = f"{prefix}stage{t}/"
            for b, count in enumerate(truth.num_objects):
                ours = result.assignment.object_index[t, b]
                reference = self.case.array(f"{stage}img{b}/assigned_gt")
                costs = self.case.array(f"{stage}img{b}/cost")
                verdict = assignment(ours, reference, costs, settings.atol)
                yield Measurement(
                    f"{stage}img{b}/assigned_gt", ours, reference, exact(), settled=verdict
                )
                total = cost.total[t, b, :, :count]
                yield Measurement(f"{stage}img{b}/cost", total, costs, value(settings.atol))
            targets = result.class_targets.multi_hot[t]
            reference = self.case.array(stage + "cls_target")
            yield Measurement(stage + "cls_target", targets, reference, exact())
            for name, ours in (
                ("avg_factor_cls", result.cls_normalizer[t]),
                ("avg_factor_reg", result.box_normalizer[t]),
                ("loss_cls", result.loss_cls[t]),
                ("loss_bbox", result.loss_bbox[t]),
                ("loss_iou", result.loss_giou[t]),
            ):
                reference = self.case.array(stage + name)
                settled = not_finite(ours, reference)
                if name.startswith("avg_factor") and float(reference) == 0 and float(ours) == 1:
                    settled = "ok (no object: the reference divides by 0, we by 1)"
                yield Measurement(stage + name, ours, reference, loss(), settled=settled)
