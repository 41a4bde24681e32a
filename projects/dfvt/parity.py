"""Cases of DFvT: ``cls_<weights>_*.npz`` (classifier) and ``det_<weights>_*.npz`` (backbone).

The weights are in ``weights_<weights>.npz`` beside the case. Images are bytes; what the network is
given is (bytes - 120) / 60.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection_toolkit.checkpoint.official import CheckpointMismatchError
from dfvt import DFvTBackbone, DFvTClassifier
from dfvt.checkpoint import convert_official_state_dict, convert_to_official

from .case import Case, CaseError, Inputs, Settings
from .compare import Limit, Measurement, value
from .runner import CaseKind, Layout, register_kind

__all__ = ["DFvTCase", "DFvTWeights"]

_NAME = re.compile(r"(cls|det)_([^_]+)_.+")
_WEIGHT = "w/"
_CLASSIFIER_ONLY = re.compile(r"(norm|head)\..*")
_BACKBONE_ONLY = re.compile(r"(norm[0-3]|conv1x1layers\.\d)\..*")
_LOGITS = 1e-5
_GRADIENT = 1e-3
# Below this norm a gradient counts as zero (that of a bias ahead of a batch norm, say), and is
# compared absolutely.
_GRADIENT_FLOOR = 1e-2
_ZERO = 1e-4


class DFvTWeights(Case):
    """A file of weights, kept in half the bits without loss."""

    def array(self, name: str) -> np.ndarray:
        array = super().array(name)
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def state_dict(self, settings: Settings, *, classifier: bool) -> dict[str, Tensor]:
        """What one of the two networks has of it, by official names."""
        inputs = Inputs(self, settings)
        other = _BACKBONE_ONLY if classifier else _CLASSIFIER_ONLY
        names = [name[len(_WEIGHT) :] for name in self.below(_WEIGHT)]
        return {n: inputs.tensor(_WEIGHT + n) for n in names if not other.fullmatch(n)}

    def build(self, settings: Settings, *, classifier: bool) -> DFvTClassifier | DFvTBackbone:
        """The network with the weights, in evaluation mode.

        Raises:
            CaseError: the weights do not fit the file's own config.
        """
        config = self.json("config_json")
        weights = self.state_dict(settings, classifier=classifier)
        try:
            arguments: dict[str, Any] = dict(
                embed_dim=config["embed_dim"],
                depths=config["depths"],
                num_heads=config["num_heads"],
                mlp_ratio=config["mlp_ratio"],
                window_size=config["window_size"],
                drop_path_rate=config["drop_path_rate"],
            )
            if classifier:
                model = DFvTClassifier(**arguments, num_classes=config["num_classes"])
            else:
                model = DFvTBackbone(**arguments)
            model.load_state_dict(convert_official_state_dict(weights, model))
        except (CheckpointMismatchError, KeyError, ValueError) as error:
            raise CaseError(f"{self.path}: {error}") from error
        return model.to(settings.device, settings.dtype).eval()


@register_kind
class DFvTCase(CaseKind):
    """Intermediate results and outputs; in training mode also gradients and batch norms."""

    title = "DFvT"

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "image_u8" in case.names and _NAME.fullmatch(case.name) is not None

    def __init__(self, case: Case):
        super().__init__(case)
        kind, weights = _NAME.fullmatch(case.name).groups()
        self._is_classifier = kind == "cls"
        self._is_training = "grad_names" in case.names
        self._weights = DFvTWeights(case.path.with_name(f"weights_{weights}.npz"))

    def layout(self) -> Layout:
        information = {"err64", "grad_names"} & self.case.names
        inputs = {"image_u8"}
        if self._is_classifier:
            compared = {"pooled", "logits"}
        elif self._is_training:
            compared = {"loss", "grad_image", "grad_l2", "grad_sum"}
        else:
            compared = {"out2", "out3"}
        optional = re.compile(r"stem|out[0-3]|s[0-3]/.+|grad/.+|after/.+")
        compared |= {name for name in self.case.names if optional.fullmatch(name)}
        return Layout(inputs, compared, information)

    def measure(self, settings: Settings) -> Iterator[Measurement]:
        model = self._weights.build(settings, classifier=self._is_classifier)
        model.train(self._is_training)
        image = (self.case.array("image_u8").astype(np.float32) - 120) / 60
        image = torch.from_numpy(image).to(settings.device, settings.dtype)
        image.requires_grad_(self._is_training)
        found = record(model)
        with torch.set_grad_enabled(self._is_training):
            if self._is_classifier:
                found["pooled"] = model.pooled(image)
                found["logits"] = model.head(found["pooled"])
            else:
                outputs = list(model(image).values())
                found.update({f"out{i}": output for i, output in enumerate(outputs)})
        for name in found:
            if name in self.case.names:
                reference = self.case.array(name)
                limit = min(settings.atol, _LOGITS) if name == "logits" else settings.atol
                ours = _as_stored(found[name], reference)
                yield Measurement(name, ours, reference, value(limit))
        if self._is_training:
            yield from self._gradients(model, image, outputs)

    def _gradients(
        self, model: nn.Module, image: Tensor, outputs: list[Tensor]
    ) -> Iterator[Measurement]:
        loss = sum(_weighted_sum(output) for output in outputs)
        loss.backward()
        yield Measurement("loss", loss, self.case.array("loss"), value(_LOGITS))
        yield self._gradient("grad_image", image.grad)
        gradients = convert_to_official({k: p.grad for k, p in model.named_parameters()}, model)
        names = [str(name) for name in self.case.array("grad_names")]
        norms, sums = self.case.array("grad_l2"), self.case.array("grad_sum")
        if not len(names) == len(norms) == len(sums):
            raise CaseError(f"{self.case.path}: grad_names, grad_l2 and grad_sum differ in length")
        unknown = sorted(set(names) - set(gradients))
        if unknown:
            raise CaseError(f"{self.case.path}: the model has no parameter {', '.join(unknown)}")
        ours = [gradients[name].double() for name in names]
        # In units of each gradient's norm; the sum of n numbers is at most sqrt(n) times theirs.
        scale = np.where(norms < _GRADIENT_FLOOR, _ZERO / _GRADIENT, norms)
        yield Measurement(
            "grad_l2",
            np.array([float(g.norm()) for g in ours]) / scale,
            norms / scale,
            value(_GRADIENT),
        )
        scale = scale * np.sqrt([g.numel() for g in ours])
        yield Measurement(
            "grad_sum",
            np.array([float(g.sum()) for g in ours]) / scale,
            sums / scale,
            value(_GRADIENT),
        )
        for name in self.case.below("grad/"):
            yield self._gradient(name, gradients[name[len("grad/") :]])
        state = convert_to_official(model.state_dict(), model)
        for name in self.case.below("after/"):
            yield Measurement(
                name, state[name[len("after/") :]], self.case.array(name), value(1e-4)
            )

    def _gradient(self, name: str, ours: Tensor) -> Measurement:
        limit = Limit(relative=_GRADIENT, as_norm=True, floor=_GRADIENT_FLOOR)
        reference = self.case.array(name)
        if np.linalg.norm(reference) < _GRADIENT_FLOOR:
            limit = value(_ZERO)
        return Measurement(name, ours, reference, limit)


def record(model: DFvTClassifier | DFvTBackbone) -> dict[str, Tensor]:
    """Let a network's next forward pass fill the returned dict with its intermediate results."""
    found: dict[str, Tensor] = {}

    def keep(name: str, pick: Callable[[Any], Tensor] = lambda out: out):
        return lambda module, args, out: found.__setitem__(name, pick(out))

    def keep_input(name: str):
        return lambda module, args: found.__setitem__(name, args[0])

    network = model.network
    network.stem.register_forward_hook(keep("stem"))
    for i, stage in enumerate(network.stages):
        stage.local.register_forward_hook(keep(f"s{i}/local"))
        stage.reduce.register_forward_hook(keep(f"s{i}/down_conv"))
        if stage.spatial is not None:
            stage.spatial.register_forward_hook(keep(f"s{i}/spatial"))
        stage.blocks[0].register_forward_pre_hook(keep_input(f"s{i}/tokens_in"))
        for j, block in enumerate(stage.blocks):
            block.dane.register_forward_pre_hook(keep_input(f"s{i}/b{j}/attn_residual"))
            block.dane.register_forward_hook(keep(f"s{i}/b{j}/dane"))
            block.register_forward_hook(keep(f"s{i}/b{j}/out"))
        stage.register_forward_hook(keep(f"s{i}/blocks_out", lambda out: out.context))
    for i, widen in enumerate(network.widen):
        widen.register_forward_hook(keep(f"s{i}/merged"))
    return found


def _as_stored(ours: Tensor, reference: np.ndarray) -> Tensor:
    """Tokens are kept as (B, h * w, C), maps as (B, C, h, w); the classifier's stem as tokens."""
    if ours.dim() != 4 or reference.ndim != 3:
        return ours
    channels_last = ours.shape[-1] == reference.shape[-1]
    return ours.flatten(1, 2) if channels_last else ours.flatten(2).transpose(1, 2)


def _weighted_sum(output: Tensor) -> Tensor:
    position = torch.arange(output.numel(), dtype=torch.float64)
    weight = torch.cos(0.37 * position).to(torch.float32).to(output)
    return (output.flatten() * weight).sum() / output.numel() ** 0.5
