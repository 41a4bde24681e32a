"""Rows of weights that belong to classes: where they are, and how they are kept by the classes'
names when weights begin a run on data with other classes, or the same in another order.

Which tensors have such rows no name tells: two models are compared that differ in their number of
classes alone.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..texts import shown
from .official_format import some_names

__all__ = ["ClassNames", "ClassRows", "find_class_rows", "keep_known_classes", "match_classes"]

logger = logging.getLogger(__name__)

_SWITCH = "train.keep_known_classes=false"
_LIKENESS = 0.75  # of a class that may have been renamed


class ClassRows(NamedTuple):
    """Where a tensor has its classes.

    Attributes:
        axis: along which they are.
        per_class: entries of a class, one after the other.
        others: entries behind those of all classes, as of the background.
        by_name: whether an entry belongs to the class of that number. Not so where a part has an
            entry for each but uses them otherwise.
    """

    axis: int
    per_class: int
    others: int
    by_name: bool

    def size(self, num_classes: int) -> int:
        """Entries along the axis for so many classes."""
        return self.per_class * num_classes + self.others


class ClassNames(NamedTuple):
    """The classes that a model is built for.

    Attributes:
        names: in the model's order.
        build: number of classes -> a model of the same kind; on the meta device is enough.
    """

    names: Sequence[str]
    build: Callable[[int], nn.Module]


def find_class_rows(build: Callable[[int], nn.Module], num_classes: int) -> dict[str, ClassRows]:
    """The tensors of a model that have entries of classes.

    A part of the model may name parts of its own in an attribute ``nameless_classes``, whose
    entries are not those of the classes of these numbers.

    Args:
        build: see :class:`ClassNames`.
        num_classes: K.
    """
    model, larger = build(num_classes), build(num_classes + 1)
    nameless = tuple(
        f"{name}.{part}." if name else f"{part}."
        for name, module in model.named_modules(remove_duplicate=False)
        for part in getattr(module, "nameless_classes", ())
    )
    shapes = {name: tensor.shape for name, tensor in larger.state_dict().items()}
    found = {}
    for name, tensor in model.state_dict().items():
        other = shapes.get(name)
        if other is None or len(other) != tensor.dim() or other == tensor.shape:
            continue
        axes = [axis for axis, size in enumerate(tensor.shape) if size != other[axis]]
        axis = axes[0]
        per_class = other[axis] - tensor.shape[axis]
        others = tensor.shape[axis] - per_class * num_classes
        if len(axes) == 1 and per_class > 0 and others >= 0:
            found[name] = ClassRows(axis, per_class, others, not name.startswith(nameless))
    return found


def match_classes(now: Sequence[str], before: Sequence[str]) -> list[int | None]:
    """For each class of a data set, the number of the class of weights that has its name.

    Names agree without regard to spaces around them and to capitals; one that is the same to the
    letter goes first. A class of the weights serves once, and a name that the weights have twice
    not at all.

    Returns:
        numbers below ``len(before)``; None for a class that is new.
    """
    result: list[int | None] = [None] * len(now)
    taken: set[int] = set()
    for key in (str.strip, lambda name: name.strip().casefold()):
        keys = [key(name) for name in before]
        counts = Counter(keys)
        places = {k: i for i, k in enumerate(keys) if counts[k] == 1}
        for i, name in enumerate(now):
            place = places.get(key(name))
            if result[i] is None and place is not None and place not in taken:
                result[i] = place
                taken.add(place)
    return result


def keep_known_classes(
    weights: Mapping[str, Tensor],
    before: Any,
    model: nn.Module,
    now: ClassNames,
    *,
    all_known: bool = False,
) -> dict[str, Tensor]:
    """Weights whose entries of classes are those of the model's classes, by name.

    What the weights have for a class of the same name is kept bit for bit, and so is what belongs
    to no class. A class that is new has the values that the model has been initialised with. One
    line of the log says which are kept.

    Args:
        weights: under the model's names.
        before: names of their classes, as a file tells them; anything else than a list of names
            leaves the weights as they are.
        model: to be initialised.
        now: the model's classes.
        all_known: leave the weights as they are unless they have all classes of the model, for
            whoever reads a model and does not train it.

    Returns:
        the weights, with other tensors where classes differ.
    """
    names = list(now.names)
    is_list = isinstance(before, (list, tuple)) and all(isinstance(name, str) for name in before)
    if not is_list or not before or not names:
        return dict(weights)
    before = list(before)
    places = match_classes(names, before)
    if places == list(range(len(before))):
        if not all_known:
            logger.info("classes: all %d are those of the weights", len(names))
        return dict(weights)
    if all_known and None in places:
        if len(before) == len(names):
            logger.warning(
                "the weights are of the classes %s, and the data of %s: they are taken by their "
                "order",
                _listed(before),
                _listed(names),
            )
        return dict(weights)
    rows = {k: row for k, row in find_class_rows(now.build, len(names)).items() if k in weights}
    if not rows:  # a backbone alone
        return dict(weights)
    state = model.state_dict()
    others = [
        name
        for name, row in rows.items()
        if not _is_of(weights[name], state[name], row, len(before))
    ]
    if others:
        logger.info(
            "the weights name %d classes, but have another number of rows (%s): none is kept by "
            "its name",
            len(before),
            some_names(others, 1),
        )
        return dict(weights)
    kept = dict(weights)
    for name, row in rows.items():
        kept[name] = _exchange(weights[name], state[name], row, places, len(before))
    _tell(names, before, places)
    return kept


def _is_of(theirs: Tensor, ours: Tensor, row: ClassRows, num_classes: int) -> bool:
    """Whether a tensor has the model's shape but for so many classes."""
    shape = list(ours.shape)
    shape[row.axis] = row.size(num_classes)
    return list(theirs.shape) == shape


def _exchange(
    theirs: Tensor, ours: Tensor, row: ClassRows, places: Sequence[int | None], num_before: int
) -> Tensor:
    """The model's tensor, with what is known of the weights'."""
    if not row.by_name:  # the first stay the first
        places = [i if i < num_before else None for i in range(len(places))]
    pairs = [
        (i * row.per_class + k, place * row.per_class + k)
        for i, place in enumerate(places)
        if place is not None
        for k in range(row.per_class)
    ]
    pairs += [
        (row.size(len(places)) - 1 - k, row.size(num_before) - 1 - k) for k in range(row.others)
    ]
    result = ours.detach().clone()
    if pairs:
        to, source = (torch.tensor(numbers) for numbers in zip(*pairs))
        values = theirs.index_select(row.axis, source.to(theirs.device))
        result.index_copy_(row.axis, to.to(result.device), values.to(result))
    return result


def _tell(names: Sequence[str], before: Sequence[str], places: Sequence[int | None]) -> None:
    kept = [name for name, place in zip(names, places) if place is not None]
    new = [name for name, place in zip(names, places) if place is None]
    left = [name for i, name in enumerate(before) if i not in places]
    twice = sorted({name for name, count in Counter(before).items() if count > 1})
    if not new:
        logger.info(
            "classes: all %d are known to the weights and take their rows by name", len(names)
        )
        return
    told = []
    for name in new:
        near = difflib.get_close_matches(name, {*left} - {*twice}, n=1, cutoff=_LIKENESS)
        hint = f" (like {shown(near[0])} of the weights)" if near else ""
        told.append(f"{shown(name)}{hint}")
    doubt = f". The weights have {_listed(twice)} more than once" if twice else ""
    same = len(before) == len(names)
    advice = f". If classes are only renamed, {_SWITCH} takes them by their order" if same else ""
    logger.log(
        logging.INFO if kept else logging.WARNING,
        "classes: %d of %d keep what the weights (%d classes) know of them%s; new: %s%s%s",
        len(kept),
        len(names),
        len(before),
        f" ({_listed(kept)})" if kept else "",
        some_names(told),
        doubt,
        advice,
    )


def _listed(names: Sequence[str]) -> str:
    return some_names([shown(name) for name in names])
