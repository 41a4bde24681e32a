"""Where the weights are in a checkpoint file, whoever wrote it, and whether they fit a model.

Training scripts wrap weights (``{"model": ...}``, ``{"state_dict": ...}``, ``{"ema": {"module":
...}}``), and wrappers of a model leave their mark on every name: ``module.`` of parallel training,
``_orig_mod.`` of ``torch.compile``, ``model.`` of Lightning. Whatever reads a file takes both off
here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .official_format import BATCH_COUNT, some_names

__all__ = ["FoundWeights", "Misfit", "find_weights"]

_PLAIN = ("model", "state_dict", "model_state_dict", "model_state", "module")
_AVERAGED = ("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema")
_PREFIXES = re.compile(r"(?:(?:module|model)\.)*")
# torch.compile may wrap parts as well, so it stands anywhere.
_COMPILED = "_orig_mod."
_COUNTER = "n_averaged"  # of PyTorch's AveragedModel
_DEPTH = 8  # of wrappers; a file may hold itself


class FoundWeights(NamedTuple):
    """The weights of a checkpoint, by the names that their model gives them."""

    plain: dict[str, Tensor] | None
    averaged: dict[str, Tensor] | None

    @property
    def any(self) -> dict[str, Tensor] | None:
        """The plain ones where there are any, else the averaged ones."""
        return self.averaged if self.plain is None else self.plain


def find_weights(checkpoint: Mapping[str, Any], wanted: Collection[str] = ()) -> FoundWeights:
    """Take the wrappers and the prefixes of a checkpoint off.

    Args:
        checkpoint: what a file holds.
        wanted: names of the model's tensors, where they are known. Of several prefixes the one is
            taken off whose tensors are the model's; otherwise that of most tensors. A prefix that
            the model has itself stays.

    Returns:
        the weights; without a tensor in the file, neither.
    """
    plain, averaged = _unwrap(checkpoint)
    return FoundWeights(
        None if plain is None else _without_prefixes(plain, wanted),
        None if averaged is None else _without_prefixes(averaged, wanted),
    )


def _unwrap(
    node: Mapping[str, Any], depth: int = 0
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The mappings that hold plain and averaged tensors."""
    plain = averaged = None
    if depth == _DEPTH:
        return None, None
    for key in _PLAIN:
        if plain is None and isinstance(node.get(key), Mapping):
            plain, within = _unwrap(node[key], depth + 1)
            averaged = averaged if within is None else within
    for key in _AVERAGED:
        if averaged is None and isinstance(node.get(key), Mapping):
            found = _unwrap(node[key], depth + 1)
            averaged = found[1] if found[0] is None else found[0]
    if plain is None and averaged is None and any(map(_is_tensor, node.values())):
        plain = node
    return plain, averaged


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _without_prefixes(weights: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Tensor]:
    tensors = {
        str(name): torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in weights.items()
        if _is_tensor(value) and name != _COUNTER
    }
    wanted = set(wanted)
    if not any(_COMPILED in name for name in wanted):
        tensors = {name.replace(_COMPILED, ""): value for name, value in tensors.items()}
    if any(_prefix(name) for name in wanted):
        return tensors
    counts: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for name in tensors:
        prefix = _prefix(name)
        counts[prefix] += 1
        hits[prefix] += name[len(prefix) :] in wanted
    if not counts:
        return tensors
    chosen = max(counts, key=lambda prefix: (hits[prefix], counts[prefix]))
    # The others, as a loss's beside Lightning's "model.", keep their names.
    kept = {name: value for name, value in tensors.items() if _prefix(name) != chosen}
    taken = {n[len(chosen) :]: value for n, value in tensors.items() if _prefix(n) == chosen}
    return {**kept, **taken}


def _prefix(name: str) -> str:
    match = _PREFIXES.match(name)
    return match.group() if match else ""


class Misfit(NamedTuple):
    """What keeps weights from giving a model all of its tensors.

    Attributes:
        missing: names of the model's tensors that the weights lack.
        shapes: (name, shape in the weights, shape in the model) of those of another size.
        surplus: names of tensors that the model lacks.
    """

    missing: Sequence[str]
    shapes: Sequence[tuple[str, Sequence[int], Sequence[int]]]
    surplus: Sequence[str]

    @property
    def too_little(self) -> bool:
        """Whether the model is not what was trained.

        A counter of a batch norm has no effect, and what the weights have besides the model may be
        a loss's. Not so stages that the model lacks.
        """
        return bool(
            self.shapes
            or any(not name.endswith(BATCH_COUNT) for name in self.missing)
            or any(name.startswith("decoder.") for name in self.surplus)
        )

    def describe(self) -> str:
        """In one line: how many, and the first of each kind."""
        resized = [
            f"{name} ({_shape(in_file)} in the file, {_shape(in_model)} in the model)"
            for name, in_file, in_model in self.shapes
        ]
        return "; ".join(
            f"{len(names)} {kind}: {some_names(names, 3)}"
            for kind, names in (
                ("of another shape", resized),
                ("missing", self.missing),
                ("that the model lacks", self.surplus),
            )
            if names
        )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
