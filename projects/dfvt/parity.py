"""Numeric cases of DFvT: ``cls_<weights>_*.npz`` (classifier), ``det_<weights>_*.npz`` (backbone).

The weights are in ``weights_<weights>.npz`` beside the case. Images are bytes; what the network is
given is (bytes - 120) / 60.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detection_toolkit.parity import (
    CASE_KINDS,
    Case,
    CaseError,
    CaseKind,
    Inputs,
    Limit,
    Quantity,
    Settings,
    expand,
)
from detection_toolkit.parity.compare import Table, value
from detection_toolkit.parity.detector import Trace

from .backbone import DFvTBackbone
from .checkpoint import convert_official_state_dict, convert_to_official
from .classifier import DFvTClassifier
from .network import DFvTNetwork

__all__ = ["DFvTCase"]

_NAME = re.compile(r"(cls|det)_([^_]+)_.+")
_ON_THE_WAY = re.compile(r"stem|out[0-3]|s[0-3]/.+")
# What one of the two networks lacks of the weights, which are those of both.
_CLASSIFIER_ONLY = re.compile(r"(norm|head)\..*")
_BACKBONE_ONLY = re.compile(r"(norm[0-3]|conv1x1layers\.\d)\..*")
_GRADIENT = 1e-3
# Below this norm a gradient counts as zero (that of a bias ahead of a batch norm, say), and is
# compared absolutely.
_GRADIENT_FLOOR = 1e-2
_ZERO = 1e-4

_CLASSIFIER: Table = {
    "pooled": (value, lambda run: run.trace["pooled"]),
    "logits": (lambda atol: value(min(atol, 1e-5)), lambda run: run.trace["logits"]),
}


class Run(NamedTuple):
    """What a case leads to; all but the trace in training mode only."""

    trace: Trace
    """Intermediate results and outputs, by the names of their arrays."""
    loss: Any = None
    image_gradient: Any = None
    gradients: Any = None
    """By official name."""
    state: Any = None
    """Weights and buffers after the step, by official name."""


@CASE_KINDS.register()
class DFvTCase(CaseKind):
    """Intermediate results and outputs; in training mode also gradients and batch norms."""

    title = "DFvT"
    information = ("err64", "grad_names")

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "image_u8" in case.names and _NAME.fullmatch(case.name) is not None

    def __init__(self, case: Case):
        super().__init__(case)
        kind, weights = _NAME.fullmatch(case.name).groups()
        self._is_classifier = kind == "cls"
        self._is_training = "grad_names" in case.names
        self._weights = Case(case.path.with_name(f"weights_{weights}.npz"))
        if self._is_training:
            self._scale = self._rescale()

    def _rescale(self) -> np.ndarray:
        """Bring what is kept of all gradients into units of each gradient's norm."""
        names, norms, sums = map(self.case.array, ("grad_names", "grad_l2", "grad_sum"))
        if not len(names) == len(norms) == len(sums):
            raise CaseError(f"{self.case.path}: grad_names, grad_l2 and grad_sum differ in length")
        scale = np.where(norms < _GRADIENT_FLOOR, _ZERO / _GRADIENT, norms)
        self.case.put("grad_l2", norms / scale)
        sizes = [self._weights.array(f"w/{name}").size for name in names]
        self.case.put("grad_sum", sums / scale / np.sqrt(sizes))
        return scale

    def quantities(self) -> Iterator[Quantity]:
        outputs = () if self._is_classifier or self._is_training else ("out2", "out3")
        on_the_way = filter(_ON_THE_WAY.fullmatch, self.case.below(""))
        for name in dict.fromkeys([*on_the_way, *outputs]):
            yield Quantity(name, value, partial(self._as_stored, name))
        if self._is_classifier:
            yield from expand(_CLASSIFIER)
        elif self._is_training:
            yield from self._step()

    def _as_stored(self, name: str, run: Run) -> Tensor:
        """Tokens are (B, h * w, C) there, maps (B, C, h, w); the classifier's stem is tokens."""
        ours, reference = run.trace[name], self.case.array(name)
        if ours.dim() != 4 or reference.ndim != 3:
            return ours
        channels_last = ours.shape[-1] == reference.shape[-1]
        return ours.flatten(1, 2) if channels_last else ours.flatten(2).transpose(1, 2)

    def _step(self) -> Iterator[Quantity]:
        yield from expand(
            {
                "loss": (value(1e-5), lambda run: run.loss),
                "grad_image": (self._gradient_limit("grad_image"), lambda run: run.image_gradient),
                "grad_l2": (value(_GRADIENT), lambda run: self._of_all(run, Tensor.norm)),
                # The sum of n numbers is at most sqrt(n) times their norm.
                "grad_sum": (
                    value(_GRADIENT),
                    lambda run: self._of_all(run, lambda x: x.sum() / x.numel() ** 0.5),
                ),
            }
        )
        for array in self.case.below("grad/"):
            name = array[len("grad/") :]
            limit = self._gradient_limit(array)
            yield Quantity(array, limit, lambda run, name=name: run.gradients[name])
        for array in self.case.below("after/"):
            name = array[len("after/") :]
            yield Quantity(array, value(1e-4), lambda run, name=name: run.state[name])

    def _gradient_limit(self, array: str) -> Limit:
        if np.linalg.norm(self.case.array(array)) < _GRADIENT_FLOOR:
            return value(_ZERO)
        return Limit(relative=_GRADIENT, as_norm=True, floor=_GRADIENT_FLOOR)

    def _of_all(self, run: Run, statistic: Callable[[Tensor], Tensor]) -> np.ndarray:
        """A number of each gradient, in units of its norm."""
        names = [str(name) for name in self.case.array("grad_names")]
        return np.array([float(statistic(run.gradients[x].double())) for x in names]) / self._scale

    def compute(self, settings: Settings) -> Run:
        model = self._build(settings).train(self._is_training)
        image = (self.case.array("image_u8").astype(np.float32) - 120) / 60
        image = torch.from_numpy(image).to(settings.device, settings.dtype)
        image.requires_grad_(self._is_training)
        trace = Trace()
        trace_network(trace, model.network)
        with torch.set_grad_enabled(self._is_training):
            if self._is_classifier:
                trace.keep("pooled", model.pooled(image))
                trace.keep("logits", model.head(trace["pooled"]))
                return Run(trace)
            outputs = list(model(image).values())
        for i, output in enumerate(outputs):
            trace.keep(f"out{i}", output)
        if not self._is_training:
            return Run(trace)
        loss = sum(_weighted_sum(output) for output in outputs)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        return Run(
            trace,
            loss,
            image.grad,
            convert_to_official(gradients, model),
            convert_to_official(model.state_dict(), model),
        )

    def _build(self, settings: Settings) -> DFvTClassifier | DFvTBackbone:
        """The network that the file of weights describes, with these."""
        config = self._weights.config("config_json")
        names = ("embed_dim", "depths", "num_heads", "mlp_ratio", "window_size", "drop_path_rate")
        arguments = {name: config[name] for name in names}
        if self._is_classifier:
            model = DFvTClassifier(**arguments, num_classes=config["num_classes"])
        else:
            model = DFvTBackbone(**arguments)
        other = _BACKBONE_ONLY if self._is_classifier else _CLASSIFIER_ONLY
        weights = Inputs(self._weights, settings).weights("w/")
        weights = {name: x for name, x in weights.items() if not other.fullmatch(name)}
        model.load_state_dict(convert_official_state_dict(weights, model))
        return model.to(settings.device, settings.dtype)


def trace_network(trace: Trace, network: DFvTNetwork) -> None:
    """Record intermediate results under the names of their arrays."""
    trace.output("stem", network.stem)
    for i, stage in enumerate(network.stages):
        trace.output(f"s{i}/local", stage.local)
        trace.output(f"s{i}/down_conv", stage.reduce)
        if stage.spatial is not None:
            trace.output(f"s{i}/spatial", stage.spatial)
        trace.input(f"s{i}/tokens_in", stage.blocks[0])
        for j, block in enumerate(stage.blocks):
            trace.input(f"s{i}/b{j}/attn_residual", block.dane)
            trace.output(f"s{i}/b{j}/dane", block.dane)
            trace.output(f"s{i}/b{j}/out", block)
        trace.output(f"s{i}/blocks_out", stage, lambda output: output.context)
    for i, widen in enumerate(network.widen):
        trace.output(f"s{i}/merged", widen)


def _weighted_sum(output: Tensor) -> Tensor:
    position = torch.arange(output.numel(), dtype=torch.float64)
    weight = torch.cos(0.37 * position).to(torch.float32).to(output)
    return (output.flatten() * weight).sum() / output.numel() ** 0.5
