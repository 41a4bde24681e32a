"""Formats of official weights, and the list in which every project enters its own.

A project describes how its authors name their tensors, and registers that when it is imported. Most
need pairs of names alone (:class:`OfficialFormat`); whatever else is a :class:`WeightFormat`.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor, nn

from ..errors import UserError
from ..projects import import_projects
from .name_rules import Change, Renamer, Rule, name_pattern

__all__ = [
    "ASK_CONFIG",
    "BATCH_COUNT",
    "COCO_CLASSES",
    "CheckpointMismatchError",
    "ConvertedWeights",
    "Mismatch",
    "OfficialFormat",
    "OfficialNames",
    "WeightFormat",
    "format_of_official",
    "format_of_ours",
    "official_formats",
    "register_official_format",
    "rename_back",
    "some_names",
    "take_weights",
]

BATCH_COUNT = ".num_batches_tracked"
"""End of the name of a batch norm's counter, which a frozen one lacks."""

ASK_CONFIG = "Is this the config of the model that the checkpoint was trained with?"

COCO_CLASSES = tuple(str(c["name"]) for c in COCO_CATEGORIES if c["isthing"])
"""The 80 of COCO, in the order of their ids."""

_PARTS = ("backbone.", "neck.")


class CheckpointMismatchError(UserError):
    """Weights and model do not fit; the message names the tensors."""


class ConvertedWeights(NamedTuple):
    """A converted official checkpoint."""

    model: dict[str, Tensor]
    """Weights under our names."""
    extras: dict[str, Tensor]
    """Tensors under their official names that the model has no place for, as they have no effect.
    They are kept so that the way back is exact."""


class WeightFormat(ABC):
    """The weights that the authors of one method released, and their way to our names and back.

    Attributes:
        name: of the method, for messages.
        sources: who publishes its weights under names of their own, where these are several; the
            first is meant where none is named.
        classes: of the released weights once they are converted, where a file does not name its
            own; empty where they are unknown.
    """

    name: str
    sources: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @abstractmethod
    def recognises(self, names: Iterable[str]) -> bool:
        """Whether official names of tensors are this format's, with ``module.`` ahead or not."""

    @abstractmethod
    def describes(self, names: Iterable[str]) -> bool:
        """Whether our names are those of a model that the format is for."""

    @abstractmethod
    def convert(
        self,
        state_dict: Mapping[str, Tensor],
        model: nn.Module,
        *,
        allow_other_sizes: bool = False,
        require_unused: bool = False,
        description: Mapping[str, Any] | None = None,
    ) -> ConvertedWeights:
        """See :func:`~.official.convert_official_state_dict`."""

    @abstractmethod
    def convert_back(
        self,
        weights: Mapping[str, Tensor],
        model: nn.Module,
        *,
        extras: Mapping[str, Tensor] | None = None,
        source: str = "",
    ) -> dict[str, Tensor]:
        """See :func:`~.official.convert_to_official`."""

    def contain(self, official: Mapping[str, Tensor], *, source: str = "") -> dict[str, Any]:
        """What a file holds whose weights are official ones."""
        return {"meta": {}, "state_dict": dict(official)}

    def refuse_other_models(self, names: Iterable[str]) -> None:
        """
        Args:
            names: ours, of all tensors of a model.

        Raises:
            CheckpointMismatchError: another format is for it.
        """
        keys = list(names)
        for other in official_formats():
            if other is not self and other.describes(keys):
                raise CheckpointMismatchError(
                    f"these are official {self.name} weights, but the model is {other.name}: "
                    f"choose a config of {self.name}"
                )

    def check(self, weights: Mapping[str, Tensor], model: nn.Module) -> None:  # noqa: B027
        """Refuse weights under our names that are to initialise a model, where leaving out what
        does not fit is not what is wanted.

        Raises:
            CheckpointMismatchError: they are those of another network.
        """


_FORMATS: dict[str, WeightFormat] = {}


def register_official_format(weight_format: WeightFormat) -> None:
    """Let all that reads checkpoints know a further format.

    Raises:
        ValueError: there is one of its name.
    """
    if weight_format.name in _FORMATS:
        raise ValueError(f"official weights of {weight_format.name} are registered already")
    _FORMATS[weight_format.name] = weight_format


@functools.cache
def _import_projects_once() -> None:
    import_projects()


def official_formats() -> list[WeightFormat]:
    """The formats of all projects, whichever of these a config uses; by name."""
    _import_projects_once()
    return [_FORMATS[name] for name in sorted(_FORMATS)]


def _derived_first() -> list[WeightFormat]:
    """The same, but what is made of another, and so has its names and more, before it."""
    return sorted(official_formats(), key=lambda f: -len(type(f).__mro__))


def format_of_official(names: Iterable[str]) -> WeightFormat:
    """The format of weights under official names.

    Raises:
        CheckpointMismatchError: it is none that is known.
    """
    keys = list(names)
    for weight_format in _derived_first():
        if weight_format.recognises(keys):
            return weight_format
    if all(key.startswith(_PARTS) for key in keys):
        # Backbone and neck alone, which several detectors name alike: whichever knows the most.
        formats = [f for f in official_formats() if isinstance(f, OfficialFormat)]
        if formats:
            return max(formats, key=lambda f: sum(f.to_ours(key) is not None for key in keys))
    raise _unknown(keys)


def format_of_ours(weights: Iterable[str], model: Iterable[str]) -> WeightFormat:
    """The format that weights under our names can be converted to.

    Args:
        weights: names of the weights.
        model: names of the tensors of the model that they are for, which decide where those of
            the weights do not.

    Raises:
        CheckpointMismatchError: it is none that is known.
    """
    ours = list(weights)
    for names in (ours, list(model)):
        for weight_format in _derived_first():
            if weight_format.describes(names):
                return weight_format
    raise _unknown(ours)


def _unknown(keys: Sequence[str]) -> CheckpointMismatchError:
    *names, last = [f.name for f in official_formats()]
    known = f"{', '.join(names)} or {last}" if names else last
    return CheckpointMismatchError(
        f"these are no weights of {known}: among {len(keys)} tensors are {some_names(keys, 4)}"
    )


class OfficialNames(Protocol):
    """What knows the official names of a detector's tensors, one by one."""

    @property
    def to_ours(self) -> Callable[[str], tuple[str, Change | None] | None]:
        """Official name -> our name, and the change of the tensor if any; None if unknown."""


class OfficialFormat(WeightFormat):
    """Whole detectors whose tensors have other names than ours, and else are ours.

    A tensor is *unused* if the official network holds it without any effect on its output. Ours
    has no such tensor, so a conversion sets it aside, and the way back restores it or, if it is
    lost, fills in the value that the official network starts from.
    """

    def __init__(
        self,
        name: str,
        rules: Sequence[Rule],
        *,
        mark: str,
        our_mark: str,
        unused: Sequence[str] = (),
        initial_unused: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = lambda weights: {},
        resizable: str = "",
        classes: Sequence[str] = (),
        check_extras: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None] | None = None,
    ):
        """
        Args:
            name: of the detector, for messages.
            rules: pairs of names.
            mark, our_mark: regular expressions that only this detector's names match.
            unused: templates of official names of unused tensors.
            initial_unused: our weights -> the unused tensors as initialised, by official name.
            resizable: regular expression of our names of tensors whose shape depends on the number
                of classes or of queries alone.
            classes: see :class:`WeightFormat`.
            check_extras: given our weights and the unused tensors of a file; warns of values that
                would have had an effect after all.
        """
        self.name = name
        self.classes = tuple(classes)
        self.initial_unused = initial_unused
        self.to_ours = Renamer((r.official, r.ours, r.to_ours) for r in rules)
        self.to_official = Renamer((r.ours, r.official, r.to_official) for r in rules)
        self._mark = re.compile(rf"(module\.)?({mark})")
        self._our_mark = re.compile(our_mark)
        self._unused = [name_pattern(template) for template in unused]
        self._resizable = re.compile(resizable)
        self._check_extras = check_extras

    def is_unused(self, official_name: str) -> bool:
        """Whether the official network holds this tensor without using it."""
        return any(pattern.fullmatch(official_name) for pattern in self._unused)

    def recognises(self, names: Iterable[str]) -> bool:
        return any(self._mark.fullmatch(name) for name in names)

    def describes(self, names: Iterable[str]) -> bool:
        return any(self._our_mark.fullmatch(name) for name in names)

    def convert(
        self,
        state_dict: Mapping[str, Tensor],
        model: nn.Module,
        *,
        allow_other_sizes: bool = False,
        require_unused: bool = False,
        description: Mapping[str, Any] | None = None,
    ) -> ConvertedWeights:
        wanted = {key: value.shape for key, value in model.state_dict().items()}
        self.refuse_other_models(wanted)

        def label(name: str) -> str:
            official = self.to_official(name)
            return f"{official[0]} (our {name})" if official else name

        weights, extras, problems = take_weights(
            state_dict,
            wanted,
            self.to_ours,
            is_unused=self.is_unused,
            may_differ=self._resizable if allow_other_sizes else None,
            label=lambda name, _: label(name),
        )
        if require_unused and not problems.missing:
            self._compare_unused(weights, extras, problems)
        problems.raise_if_any(f"official {self.name} weights do not fit the model", ASK_CONFIG)
        if self._check_extras is not None:
            self._check_extras(weights, extras)
        return ConvertedWeights({name: weights[name] for name in wanted}, extras)

    def _compare_unused(
        self, weights: Mapping[str, Tensor], extras: Mapping[str, Tensor], problems: Mismatch
    ) -> None:
        expected = self.initial_unused(weights)
        problems.missing += sorted(set(expected) - set(extras))
        problems.shapes += [
            f"{key} is {tuple(extras[key].shape)}, expected {tuple(value.shape)}"
            for key, value in expected.items()
            if key in extras and extras[key].shape != value.shape
        ]
        problems.surplus += sorted(
            key for key in extras if key not in expected and not key.endswith(BATCH_COUNT)
        )

    def convert_back(
        self,
        weights: Mapping[str, Tensor],
        model: nn.Module,
        *,
        extras: Mapping[str, Tensor] | None = None,
        source: str = "",
    ) -> dict[str, Tensor]:
        wanted = model.state_dict()
        problems = Mismatch.between(weights, wanted)
        problems.raise_if_any("the weights do not fit the model", ASK_CONFIG)
        official, nameless = rename_back({name: weights[name] for name in wanted}, self)
        if nameless:
            raise CheckpointMismatchError(
                f"{some_names(nameless)} have no name in official {self.name} checkpoints: only "
                "detectors with a backbone that the authors released can be converted back"
            )
        unused = self.initial_unused(weights)
        for key in list(official):
            stem = key[: -len(".running_var")]
            if key.endswith(".running_var") and stem + BATCH_COUNT not in official:
                unused[stem + BATCH_COUNT] = torch.tensor(0)
        foreign = sorted(
            key
            for key, value in (extras or {}).items()
            if key not in unused or unused[key].shape != value.shape
        )
        if foreign:
            raise CheckpointMismatchError(
                f"the extras {some_names(foreign)} do not belong to this {self.name} model"
            )
        official.update(unused)
        official.update(extras or {})
        return official


def take_weights(
    state_dict: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    rename: Callable[[str], tuple[str, Change | None] | None],
    *,
    is_unused: Callable[[str], bool],
    is_required: Callable[[str], bool] = lambda name: True,
    may_differ: re.Pattern[str] | None = None,
    label: Callable[[str, str | None], str],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Mismatch]:
    """Give the tensors of an official file our names, and note what does not fit.

    Args:
        state_dict: weights under the official names.
        wanted: shapes of the model's tensors, by our names.
        rename: official name -> our name and what changes the tensor; None if it is unknown.
        is_unused: whether a tensor of an official name is to be set aside.
        is_required: whether the file must have a tensor of our name.
        may_differ: our names of tensors that may have another shape than is wanted.
        label: our name and the official one, None if the file lacks it -> what messages call it.

    Returns:
        weights by our names, tensors set aside by official ones, and the problems.
    """
    weights: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    official: dict[str, str] = {}
    problems = Mismatch()
    for key, value in state_dict.items():
        renamed = rename(key)
        if renamed is not None and renamed[0] in wanted:
            name, change = renamed
            weights[name] = value if change is None else change(value)
            official[name] = key
        elif is_unused(key) or (renamed and key.endswith(BATCH_COUNT)):
            extras[key] = value
        elif renamed is not None:
            problems.surplus.append(f"{key} (would be {renamed[0]})")
        else:
            problems.surplus.append(key)
    for name, shape in wanted.items():
        if name not in weights:
            if is_required(name):
                problems.missing.append(label(name, None))
        elif weights[name].shape != shape and not (may_differ and may_differ.fullmatch(name)):
            problems.shapes.append(
                f"{label(name, official[name])} is {tuple(weights[name].shape)}, "
                f"the model has {tuple(shape)}"
            )
    return weights, extras, problems


def rename_back(
    weights: Mapping[str, Tensor], official_format: OfficialFormat
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under their official names, and our names of those that have none."""
    official: dict[str, Tensor] = {}
    nameless = []
    for name, value in weights.items():
        renamed = official_format.to_official(name)
        if renamed is None:
            nameless.append(name)
            continue
        key, change = renamed
        official[key] = value if change is None else change(value)
    return official, nameless


class Mismatch:
    """Collects what does not fit, so that one error tells it all."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.surplus: list[str] = []
        self.shapes: list[str] = []

    @classmethod
    def between(cls, weights: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> Mismatch:
        """What keeps weights under our names from being exactly the tensors that are wanted."""
        problems = cls()
        problems.missing = sorted(set(wanted) - set(weights))
        problems.surplus = sorted(set(weights) - set(wanted))
        problems.shapes = [
            f"{name} is {tuple(weights[name].shape)}, the model has {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in weights and weights[name].shape != value.shape
        ]
        return problems

    def raise_if_any(self, heading: str, advice: str = "") -> None:
        """
        Raises:
            CheckpointMismatchError: there are problems.
        """
        found = [
            f"{len(names)} {kind}: {some_names(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("surplus", self.surplus),
                ("of the wrong shape", self.shapes),
            )
            if names
        ]
        if found:
            message = f"{heading}:\n  " + "\n  ".join(found)
            raise CheckpointMismatchError(f"{message}\n{advice}" if advice else message)


def some_names(names: Sequence[str], count: int = 10) -> str:
    """A list for a message, cut short."""
    more = f", ... and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
