"""What cases of all detectors of the family have in common: features in, stages out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from torch import Tensor, nn

from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    convert_official_state_dict,
)
from detection_toolkit.checkpoint.official_format import OfficialFormat
from detection_toolkit.modeling import Execution, FeatureMaps
from detection_toolkit.structures import GroundTruth, StageOutput
from detection_toolkit.training import Criterion, HungarianMatcher
from stageinteractor import InitialQueries, StageInteractor

from .case import WEIGHT, Case, CaseError, Inputs, Settings
from .compare import (
    Limit,
    Measurement,
    exact,
    geometry,
    gradient,
    loss,
    pixels,
    value,
)
from .runner import CaseKind, Layout

__all__ = [
    "CaseFeatures",
    "DecoderCase",
    "Outcome",
    "align_detections",
    "assignment",
    "measure_gradient",
    "not_finite",
]


class CaseFeatures(nn.Module):
    """Stands in for backbone and neck: returns the features of the case."""

    def __init__(self, features: Sequence[Tensor], strides: Sequence[int]):
        super().__init__()
        self.features = list(features)
        self.strides = list(strides)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"level{i}": ShapeSpec(channels=feature.shape[1], stride=stride)
            for i, (feature, stride) in enumerate(zip(self.features, self.strides))
        }

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {f"level{i}": feature for i, feature in enumerate(self.features)}


def sized_maps(image_sizes: Sequence[tuple[int, int]]) -> FeatureMaps:
    """Maps of which only the sizes of the images are known."""
    return FeatureMaps((), (), torch.tensor(image_sizes), (0, 0))


class Trace:
    """Records what goes through the parts of a decoder, by forward hooks."""

    def __init__(self, decoder: nn.Module):
        self.values: dict[tuple[int, str], list[Any]] = {}
        for t, stage in enumerate(decoder.stages):
            self._watch(t, "attention", stage.attention)
            self._watch(t, "mixing", stage.mixing)
            self._watch(t, "ffn", stage.ffn)
            self._watch(t, "delta", stage.box_tower)
            self._watch(t, "stage", stage)
            stage.sampling.register_forward_hook(self._sampling_hook(t))
            for norm in (stage.mixing.channel_norm, stage.mixing.spatial_norm):
                self._watch_input(t, "before_norm", norm)
            self._watch_input(t, "before_last_norm", stage.mixing.norm)

    def __call__(self, t: int, name: str) -> Any:
        return self.values[t, name][-1]

    def all(self, t: int, name: str) -> list[Any]:
        return self.values[t, name]

    def _record(self, t: int, name: str, x: Any) -> None:
        self.values.setdefault((t, name), []).append(x)

    def _watch(self, t: int, name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, __, output: self._record(t, name, output))

    def _watch_input(self, t: int, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, inputs: self._record(t, name, inputs[0]))

    def _sampling_hook(self, t: int):
        def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            points = module.points(*inputs[:2])
            self._record(t, "points", points)
            self._record(t, "level_weights", module.level_weights(points.z, inputs[2].strides))
            self._record(t, "sampled", output)

        return record


class Outcome(NamedTuple):
    """Everything that one run of a case leads to."""

    model: StageInteractor
    outputs: list[StageOutput]
    trace: Trace
    features: list[Tensor]


class DecoderCase(CaseKind):
    """Case of a query head on given features, with or without a training step."""

    official_format: OfficialFormat

    def __init__(self, case: Case):
        super().__init__(case)
        self.summary = case.summary
        self.execution = Execution()
        self.num_stages = int(self.summary["num_stages"])
        self.strides = [int(x) for x in self.summary["strides"]]
        sizes = case.array("image_sizes")
        if sizes.ndim != 2 or sizes.shape[1] != 2:
            raise CaseError(f"{case.path}: image_sizes must be (B, 2), not {sizes.shape}")
        self.image_sizes = [(int(h), int(w)) for h, w in sizes]
        self.is_training = "total_loss" in case.names or bool(case.below("gt/"))

    @abstractmethod
    def build_decoder(self) -> nn.Module:
        """The query head that the case's config describes."""

    @abstractmethod
    def build_label_assigner(self) -> nn.Module:
        """How class targets are made."""

    @property
    def stages(self) -> range:
        """Indices of the stages."""
        return range(self.num_stages)

    @property
    def images(self) -> range:
        """Indices of the images."""
        return range(len(self.image_sizes))

    def input_names(self) -> set[str]:
        """Arrays that every case of the family is fed with."""
        names = {"image_sizes"} | {f"feat/{i}" for i in range(len(self.strides))}
        if self.is_training:
            names |= {f"gt/{b}/{x}" for b in self.images for x in ("boxes", "labels")}
        return names

    def detection_names(self) -> set[str]:
        """Final detections of all images."""
        return {f"det/{b}/{x}" for b in self.images for x in ("boxes", "scores", "labels")}

    def parameter_names(self) -> list[str]:
        """Official names of the weights that a gradient may reach."""
        buffers = ("running_mean", "running_var", "num_batches_tracked", "init_proposal_bboxes")
        names = [name[len(WEIGHT) :] for name in self.case.below(WEIGHT)]
        return [name for name in names if not name.endswith(buffers)]

    def compute(self, settings: Settings) -> Outcome:
        """Build the detector around the case's features, load its weights, and run it.

        Raises:
            CaseError: the weights do not fit the config.
        """
        self.execution = settings.execution
        inputs = Inputs(self.case, settings)
        features = [inputs.tensor(f"feat/{i}") for i in range(len(self.strides))]
        num_classes = int(self.summary["num_classes"])
        try:
            model = StageInteractor(
                backbone=CaseFeatures(features, self.strides),
                initial_queries=InitialQueries(
                    int(self.summary["num_queries"]), int(self.summary["content_dim"])
                ),
                decoder=self.build_decoder(),
                criterion=Criterion(
                    num_classes=num_classes,
                    matcher=HungarianMatcher(),
                    label_assigner=self.build_label_assigner(),
                ),
                num_classes=num_classes,
                max_detections=int(self.summary["max_per_img"]),
                execution=self.execution,
            )
            weights = convert_official_state_dict(inputs.weights(), model, require_unused=True)
        except CheckpointMismatchError as error:
            raise CaseError(f"{self.case.path}: {error}") from error
        model.load_state_dict(weights.model)
        if settings.replace_parts is not None:
            model.decoder = settings.replace_parts(model.decoder)
            model.criterion = settings.replace_parts(model.criterion)
        model.to(settings.device, settings.dtype).train(self.is_training)
        if self.is_training:
            for feature in features:
                feature.requires_grad_()
        trace = Trace(model.decoder)
        stride = self.strides[0]
        height, width = (x * stride for x in features[0].shape[-2:])
        image = features[0].new_zeros(len(features[0]), 3, height, width)
        with torch.set_grad_enabled(self.is_training):
            outputs = model.predict(ImageList(image, self.image_sizes)).stages
        return Outcome(model, outputs, trace, features)

    def layout(self) -> Layout:
        compared = self.training_names() if self.is_training else self.forward_names()
        return Layout(self.input_names(), compared, set())

    @abstractmethod
    def training_names(self) -> set[str]:
        """Arrays that a training case is compared with."""

    @abstractmethod
    def forward_names(self) -> set[str]:
        """Arrays that a forward case is compared with."""

    def measure(self, settings: Settings) -> Iterator[Measurement]:
        outcome = self.compute(settings)
        if self.is_training:
            yield from self.measure_training(outcome, settings)
        else:
            yield from self.measure_forward(outcome, settings)

    @abstractmethod
    def measure_training(self, outcome: Outcome, settings: Settings) -> Iterator[Measurement]:
        """Compare a training step."""

    @abstractmethod
    def measure_forward(self, outcome: Outcome, settings: Settings) -> Iterator[Measurement]:
        """Compare a forward pass."""

    # Pieces for the subclasses.

    def measured(self, name: str, ours: Any, limit: Limit) -> Measurement:
        """Compare with the array of this name."""
        return Measurement(name, ours, self.case.array(name), limit)

    def truth(self, settings: Settings) -> GroundTruth:
        """The objects of the case."""
        inputs = Inputs(self.case, settings)
        return GroundTruth.collate(
            [inputs.tensor(f"gt/{b}/boxes", exact=True) for b in self.images],
            [inputs.tensor(f"gt/{b}/labels") for b in self.images],
            self.image_sizes,
        )

    def measure_queries(self, outcome: Outcome, settings: Settings) -> Iterator[Measurement]:
        """Initial queries."""
        content, xyzr = outcome.model.initial_queries(sized_maps(self.image_sizes))[:2]
        none = [content.new_zeros(0, 4)] * len(self.image_sizes)
        labels = [content.new_zeros(0, dtype=torch.long)] * len(self.image_sizes)
        sizes = GroundTruth.collate(none, labels, self.image_sizes).image_sizes
        yield self.measured("init/content", content, value(settings.atol))
        yield self.measured("init/xyzr", xyzr, geometry(settings.atol, 2))
        yield self.measured("init/imgs_whwh", sizes.repeat(1, 2)[:, None], exact())

    def measure_predictions(
        self, t: int, output: StageOutput, settings: Settings, names: Sequence[str]
    ) -> Iterator[Measurement]:
        """Those of a stage's predictions that the case holds under ``names``."""
        every = {
            "cls_score": (output.logits, value(settings.atol)),
            "xyzr": (output.queries.geometry, geometry(settings.atol, 2)),
            "boxes": (output.boxes, pixels()),
            "object_feats": (output.queries.content, value(settings.atol)),
        }
        for name in names:
            yield self.measured(f"stage{t}/{name}", *every[name])

    def measure_detections(self, outcome: Outcome, settings: Settings) -> Iterator[Measurement]:
        """Final detections, best first. Those of equal score may come in any order."""
        found = outcome.model.inference(outcome.outputs[-1], self.image_sizes)
        for b, instances in enumerate(found):
            scores = instances.scores.cpu().double().numpy()
            labels = instances.pred_classes.cpu().numpy()
            boxes = instances.pred_boxes.tensor.detach().cpu().double().numpy()
            expected = [self.case.array(f"det/{b}/{x}") for x in ("scores", "labels", "boxes")]
            if len(scores) == len(expected[0]):
                order = align_detections((scores, labels, boxes), expected)
                scores, labels, boxes = scores[order], labels[order], boxes[order]
            yield self.measured(f"det/{b}/scores", scores, value(settings.atol))
            yield self.measured(f"det/{b}/labels", labels, exact())
            yield self.measured(f"det/{b}/boxes", boxes, pixels())

    def measure_costs(
        self, outcome: Outcome, truth: GroundTruth, settings: Settings
    ) -> Iterator[Measurement]:
        """Matching costs by term; terms before weighting."""
        logits = torch.stack([x.logits for x in outcome.outputs]).detach().to(truth.boxes.dtype)
        boxes = torch.stack([x.boxes for x in outcome.outputs]).detach()
        cost = outcome.model.criterion.matcher.cost(logits, boxes, truth)
        for t in self.stages:
            for b, count in enumerate(truth.num_objects):
                for name, term in (
                    ("total", cost.total),
                    ("cls", cost.classification),
                    ("l1", cost.l1),
                    ("giou", cost.giou),
                ):
                    yield self.measured(
                        f"stage{t}/img{b}/cost_{name}", term[t, b, :, :count], value(settings.atol)
                    )

    def measure_losses(self, t: int, terms: Sequence[tuple[str, Tensor]]) -> Iterator[Measurement]:
        """Loss terms, or what they are divided by, of a stage."""
        for name, ours in terms:
            quantity = f"stage{t}/{name}"
            reference = self.case.array(quantity)
            settled = not_finite(ours, reference)
            if name.startswith("avg_factor") and float(reference) == 0 and float(ours) == 1:
                settled = "ok (no object: the reference divides by 0, we by 1)"
            yield Measurement(quantity, ours, reference, loss(), settled=settled)

    def measure_total(self, total: Tensor) -> Measurement:
        """Sum of all losses."""
        reference = self.case.array("total_loss")
        return Measurement(
            "total_loss", total, reference, loss(), settled=not_finite(total, reference)
        )

    def gradients(self, outcome: Outcome) -> dict[str, Tensor | None]:
        """Gradients by official name, None where there is none, of all parameters of the case."""
        ours = {name: p.grad for name, p in outcome.model.named_parameters()}
        found: dict[str, Tensor | None] = {}
        for official in self.parameter_names():
            renamed = self.official_format.to_ours(official)
            found[official] = ours.get(renamed[0]) if renamed else None
        return found

    def gradient_limit(self, name: str, largest: float) -> Limit:
        """Limit of a gradient, with the largest norm of the case as its scale."""
        return gradient(name, largest if np.isfinite(largest) else 0.0)


def measure_gradient(
    quantity: str,
    ours: Tensor | None,
    reference: np.ndarray,
    *,
    limit: Limit,
    is_norm: bool,
    covers: tuple[str, ...] = (),
) -> Measurement:
    """Compare a gradient, or its L2 norm. A reference of -1 says that there is none; a tensor
    that our model does without has none either, and the reference must then be zero."""
    if ours is None:
        computed = torch.zeros(()) if is_norm else torch.zeros(reference.shape)
    else:
        computed = ours.norm() if is_norm else ours
    settled = not_finite(computed, reference)
    if is_norm and float(reference) == -1 and float(computed) == 0:
        settled = "ok (no gradient on either side)"
    return Measurement(quantity, computed, reference, limit, covers, settled)


def not_finite(ours: Tensor, reference: np.ndarray) -> str:
    """Verdict where the reference is infinite or no number, as without any object in the batch,
    where it divides by zero: ours must be finite. Empty if the reference is finite."""
    if np.isfinite(reference).all():
        return ""
    if torch.isfinite(ours).all():
        return "ok (reference not finite, ours finite)"
    return "FAIL ours is not finite either"


def assignment(ours: Tensor, reference: np.ndarray, cost: np.ndarray, atol: float) -> str:
    """Verdict on matches that differ from the reference: fine if both cost the same in total.

    Args:
        ours: (N,) object of each query, -1 for none.
        reference: the same.
        cost: (N, M) the reference's matching cost.
        atol: largest difference between total costs of a tie.
    """
    matches = ours.cpu().numpy()
    if np.array_equal(matches, reference):
        return ""
    in_range = matches.shape == reference.shape and matches.max(initial=-1) < cost.shape[1]
    if not in_range or (matches >= 0).sum() != (reference >= 0).sum():
        return ""
    totals = [
        float(cost[np.flatnonzero(m >= 0), m[m >= 0]].astype(np.float64).sum())
        for m in (matches, reference)
    ]
    if abs(totals[0] - totals[1]) <= atol:
        return f"ok (tie: total cost {totals[0]:.6f}, reference {totals[1]:.6f})"
    return f"FAIL total cost {totals[0]:.6f}, reference {totals[1]:.6f}"


def align_detections(
    ours: Sequence[np.ndarray], reference: Sequence[np.ndarray], tie: float = 1e-5
) -> np.ndarray:
    """Our order of the detections, with those of (nearly) the same score as in the reference."""
    scores, labels, boxes = ours
    order = np.arange(len(scores))
    start = 0
    for end in range(1, len(scores) + 1):
        if end < len(scores) and scores[end - 1] - scores[end] <= tie:
            continue
        group = list(range(start, end))
        for place in range(start, end):
            distance = [
                (labels[i] != reference[1][place], np.abs(boxes[i] - reference[2][place]).max())
                for i in group
            ]
            order[place] = group.pop(min(range(len(group)), key=distance.__getitem__))
        start = end
    return order
