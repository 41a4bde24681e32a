"""What cases of query-based detectors have in common, whatever the names of their arrays.

Letters: B images, N queries, S stages, K classes, M objects.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..checkpoint.official import convert_official_state_dict
from ..checkpoint.official_format import OfficialNames
from ..modeling import FeatureMaps, QueryDetector
from ..structures import GroundTruth, Predictions
from .case import Case, CaseError, Inputs, Settings
from .compare import Limit, Quantity, gradient, to_array
from .runner import CaseKind

__all__ = [
    "CaseFeatures",
    "QueryCase",
    "Run",
    "Trace",
    "align_detections",
    "assignment",
    "read_truth",
    "same_matches",
    "supervise",
]


class CaseFeatures(nn.Module):
    """Stands in for a backbone: returns the features of the case."""

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


class Trace:
    """Records what goes through parts of a network, by forward hooks, in the order of calls."""

    def __init__(self) -> None:
        self._values: dict[Hashable, list[Any]] = {}

    def __getitem__(self, key: Hashable) -> Any:
        """What was recorded last under this key."""
        return self.all(key)[-1]

    def all(self, key: Hashable) -> list[Any]:
        """Everything that was recorded under this key."""
        try:
            return self._values[key]
        except KeyError:
            raise CaseError(f"nothing in our network is {key}") from None

    def keep(self, key: Hashable, value: Any) -> None:
        """Record a value."""
        self._values.setdefault(key, []).append(value)

    def output(
        self, key: Hashable, module: nn.Module, pick: Callable[[Any], Any] = lambda output: output
    ) -> None:
        """Record what a module returns, or a part of it."""
        module.register_forward_hook(lambda _, __, output: self.keep(key, pick(output)))

    def input(self, key: Hashable, module: nn.Module) -> None:
        """Record a module's first argument."""
        module.register_forward_pre_hook(lambda _, inputs: self.keep(key, inputs[0]))


@dataclass
class Run:
    """A forward pass of a detector, or a training step."""

    outputs: Sequence[Any]
    """Of the S stages, or groups of queries: logits, boxes, and queries where there are any."""
    model: Any = None
    trace: Trace = field(default_factory=Trace)
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]] = ()
    """Scores, labels and boxes of each image."""
    truth: Any = None
    losses: Any = None
    """The criterion's result."""
    index: Any = None
    """(S, B, N) object of each query, -1 for background."""
    cost: Any = None
    """Matching cost with terms (S, B, N, M)."""
    total: Any = None
    gradients: Mapping[Any, Tensor | None] = field(default_factory=dict)
    """By official name of the parameter, or index of the feature map; None where there is none."""

    @property
    def labels(self) -> Tensor:
        """(S, B, N) class of the object, K for background."""
        labels = self.truth.labels.expand(len(self.index), -1, -1).gather(2, self.index.clamp(0))
        return torch.where(self.index < 0, self.outputs[0].logits.shape[-1], labels)

    @property
    def boxes(self) -> Tensor:
        """(S, B, N, 4) box of the object, zero for background."""
        index = self.index[..., None].expand(-1, -1, -1, 4)
        boxes = self.truth.boxes.expand(len(index), -1, -1, -1).gather(2, index.clamp(0))
        return boxes * (index >= 0)


def supervise(
    criterion: Any,
    predictions: Predictions,
    truth: GroundTruth,
    by_output: Callable[[Any], Any] = lambda losses: losses,
) -> Run:
    """Match and judge predictions.

    Args:
        by_output: takes from the criterion's result that with a row for each of the outputs.
    """
    losses = criterion(predictions, truth)
    outputs = predictions.stages
    logits = torch.stack([x.logits for x in outputs]).detach().to(truth.boxes.dtype)
    boxes = torch.stack([x.boxes for x in outputs]).detach()
    return Run(
        outputs,
        truth=truth,
        losses=losses,
        index=by_output(losses).assignment.object_index,
        cost=criterion.matcher.cost(logits, boxes, truth),
        total=torch.stack(list(losses.as_dict().values())).sum(),
    )


class QueryCase(CaseKind):
    """Case of a detector on given feature maps, with or without a training step."""

    weights: ClassVar[str] = "weight/"
    """What the names of all weights begin with."""
    official_format: ClassVar[OfficialNames]
    buffers: ClassVar[tuple[str, ...]] = ("running_mean", "running_var", "num_batches_tracked")
    """How the official names of weights without a gradient end."""
    gradient_share: ClassVar[float] = 2e-3
    """Share of its norm that a gradient may differ by."""
    less_certain: ClassVar[Mapping[str, float]] = {}
    """How the official names of parameters end whose gradients have a limit of their own -> it."""
    sizes_name: ClassVar[str]
    """Array (B, 2) with the height and width of each unpadded image."""
    padded_size_name: ClassVar[str] = ""
    """Array (2,) with the height and width of the padded batch. Where a file has none, it is that
    of the finest map times its stride."""
    map_names: list[str]
    """Arrays of the feature maps, finest first."""
    strides: list[int]

    def __init__(self, case: Case):
        super().__init__(case)
        sizes = case.array(self.sizes_name)
        if sizes.ndim != 2 or sizes.shape[1] != 2:
            raise CaseError(f"{case.path}: {self.sizes_name} must be (B, 2), not {sizes.shape}")
        self.image_sizes = [(int(h), int(w)) for h, w in sizes]
        self.is_training = bool(case.below("gt/"))

    @property
    def images(self) -> range:
        """Indices of the images."""
        return range(len(self.image_sizes))

    def parameter_names(self) -> list[str]:
        """Official names of the weights that a gradient may reach."""
        names = [name[len(self.weights) :] for name in self.case.below(self.weights)]
        return [name for name in names if not name.endswith(self.buffers)]

    def our_name(self, official: str) -> str | None:
        """Our name of a weight; None if we have none."""
        renamed = self.official_format.to_ours(official)
        return renamed[0] if renamed else None

    def batch(self, features: Sequence[Tensor]) -> ImageList:
        """The batch of images that the features would come from."""
        if self.padded_size_name in self.case.names:
            size = [int(x) for x in self.case.array(self.padded_size_name)]
        else:
            size = [x * self.strides[0] for x in features[0].shape[-2:]]
        image = features[0].new_zeros(len(features[0]), 3, *size)
        return ImageList(image, self.image_sizes)

    def load_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Load the case's weights through the converter of official checkpoints."""
        model.load_state_dict(
            convert_official_state_dict(weights, model, require_unused=True).model
        )

    def sizes_whwh(self) -> Tensor:
        """(B, 1, 4) width, height, width, height of each image."""
        return torch.tensor([(w, h, w, h) for h, w in self.image_sizes])[:, None]

    def sized_maps(self) -> FeatureMaps:
        """Maps of which only the sizes of the images are known, for initial queries."""
        return FeatureMaps((), (), torch.tensor(self.image_sizes), (0, 0))

    def trace(self, model: QueryDetector) -> Trace:
        """Record what goes through the parts of the model from now on."""
        return Trace()

    @torch.no_grad()
    def infer(
        self,
        model: QueryDetector,
        features: Sequence[Tensor],
        expected: Sequence[Sequence[np.ndarray]],
    ) -> Run:
        """A forward pass.

        Args:
            model: in evaluation mode.
            features: of the case.
            expected: scores, labels and boxes of each image; ours that have (nearly) the same
                score are brought into the same order.
        """
        trace = self.trace(model)
        outputs = model.predict(self.batch(features)).stages
        detections = []
        for instances, reference in zip(model.inference(outputs[-1], self.image_sizes), expected):
            boxes, scores = instances.pred_boxes.tensor, instances.scores
            ours = [to_array(x) for x in (scores.double(), instances.pred_classes, boxes.double())]
            if len(scores) == len(reference[0]):
                order = align_detections(ours, reference)
                ours = [x[order] for x in ours]
            detections.append((ours[0], ours[1], ours[2]))
        return Run(outputs, model, trace, detections)

    def train(
        self,
        model: QueryDetector,
        features: Sequence[Tensor],
        settings: Settings,
        by_output: Callable[[Any], Any] = lambda losses: losses,
    ) -> Run:
        """A training step; see :func:`supervise`."""
        model.train().zero_grad()
        for feature in features:
            feature.requires_grad_().grad = None
        truth = read_truth(Inputs(self.case, settings), "gt/", self.image_sizes)
        predictions = model.predict(self.batch(features), truth)
        run = supervise(model.criterion, predictions, truth, by_output)
        run.total.backward()
        ours = {name: p.grad for name, p in model.named_parameters()}
        gradients: dict[Any, Tensor | None] = {i: x.grad for i, x in enumerate(features)}
        for official in self.parameter_names():
            gradients[official] = ours.get(self.our_name(official))
        return replace(run, model=model, gradients=gradients)

    def compare_gradients(
        self,
        norm: str,
        full: str,
        *,
        norm_of_map: str,
        full_of_map: str = "",
        optional: bool = False,
    ) -> Iterator[Quantity]:
        """The gradients of a training step, whose run has them as ``gradients``.

        Those in full are given for some tensors only; which is the file's choice.

        Args:
            norm, full: what the arrays of norms, and of gradients in full, begin with; the
                official name follows.
            norm_of_map, full_of_map: names of those of the feature maps, with {} for the index.
            optional: the norms, too.
        """
        norms = [norm + name for name in self.parameter_names() if norm + name in self.case.names]
        largest = max((float(self.case.array(name)) for name in norms), default=0.0)
        largest = largest if np.isfinite(largest) else 0.0
        names: list[tuple[Any, str, str]] = [
            (name, norm + name, full + name) for name in self.parameter_names()
        ]
        names += [
            (i, norm_of_map.format(i), full_of_map.format(i)) for i in range(len(self.map_names))
        ]
        for key, norm_name, full_name in names:
            own = [x for end, x in self.less_certain.items() if norm_name.endswith(end)]
            limit = gradient(largest, *(own or [self.gradient_share]))
            yield Quantity(norm_name, limit, partial(_gradient, key, None), optional)
            if full_name in self.case.names:
                shape = self.case.array(full_name).shape
                yield Quantity(full_name, limit, partial(_gradient, key, shape))


def _gradient(key: Any, shape: tuple[int, ...] | None, run: Run) -> Tensor:
    """A gradient, or its norm where no shape is given. A tensor that our model does without has
    none; the reference must then be zero."""
    found = run.gradients[key]
    if found is None:
        return torch.zeros(shape or ())
    return found if shape else found.norm()


def read_truth(inputs: Inputs, prefix: str, image_sizes: Sequence[tuple[int, int]]) -> GroundTruth:
    """The objects of a batch."""
    images = range(len(image_sizes))
    return GroundTruth.collate(
        [inputs.tensor(f"{prefix}{b}/boxes", exact=True) for b in images],
        [inputs.tensor(f"{prefix}{b}/labels") for b in images],
        image_sizes,
    )


def same_matches(case: Case, cost_names: Sequence[str], atol: float) -> Limit:
    """The limit of matches of one or several images: identical, or of the same total cost.

    Args:
        case: holds the reference's matching costs (N, M).
        cost_names: their arrays, one an image.
        atol: see :func:`assignment`.
    """

    def settle(ours: np.ndarray, reference: np.ndarray) -> str:
        verdicts = []
        for one, other, name in zip(np.atleast_2d(ours), np.atleast_2d(reference), cost_names):
            if not np.array_equal(one, other):
                verdicts.append(assignment(one, other, case.array(name), atol))
        # Whatever is no tie, if any, decides; an empty verdict leaves it to the comparison.
        return min(verdicts, key=lambda verdict: verdict.startswith("ok"), default="")

    return Limit(settle=settle)


def assignment(ours: Any, reference: np.ndarray, cost: np.ndarray, atol: float) -> str:
    """Verdict on matches that differ from the reference: fine if both cost the same in total.

    Args:
        ours: (N,) object of each query, -1 for none.
        reference: the same.
        cost: (N, M) the reference's matching cost.
        atol: largest difference between total costs of a tie.
    """
    matches = to_array(ours)
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
