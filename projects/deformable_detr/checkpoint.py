"""Deformable DETR's weights of MMDetection, the original repository, detrex and Hugging Face."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from detection_toolkit.checkpoint.name_rules import Change
from detection_toolkit.checkpoint.official_format import (
    ASK_CONFIG,
    BATCH_COUNT,
    COCO_CLASSES,
    CheckpointMismatchError,
    ConvertedWeights,
    Mismatch,
    WeightFormat,
    register_official_format,
    some_names,
    take_weights,
)

from .attention import DeformableAttention
from .heads import SCORE_AT_START
from .official_names import HUGGING_FACE, MMDETECTION_2, SOURCES, Source

__all__ = ["CATEGORY_ROWS", "DEFORMABLE_DETR", "DeformableDETRFormat"]

_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CATEGORY_ROWS = tuple(i for i in range(1, 91) if i not in _GAPS)
"""COCO's category ids in the order of the 80 classes. Whoever numbers classes by them has 91 rows
in a class layer, of which no object is of the others."""
_NUM_ROWS = 91

_RESIZABLE = re.compile(
    r"(decoder\.stages\.\d+|initial_queries)\.head\.classes\..*|initial_queries\.embedding\.weight"
)
_STAGE = re.compile(r"decoder\.stages\.(\d+)\.attention\.sampling_offsets\.weight")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.attention\.sampling_offsets\.weight")
_CONFIGS = {
    "plain": "deformable_detr/deformable_detr_r50_50e.py",
    "refined": "deformable_detr/deformable_detr_refine_r50_50e.py",
    "two-stage": "deformable_detr/deformable_detr_two_stage_r50_50e.py",
}
_MODEL_TYPE = "deformable_detr"  # as Hugging Face calls it
_QKV = ("q_proj", "k_proj", "v_proj")


class _Facts(NamedTuple):
    """What weights, or a model, are; None: they do not tell."""

    kind: str | None
    neck_bias: bool | None
    levels: int
    layers: int
    stages: int


def _count(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    return sum(pattern.fullmatch(name) is not None for name in names)


def _neck_bias(names: Iterable[str]) -> bool | None:
    found = [x for x in names if x.startswith("backbone.projections.0.")]
    return "backbone.projections.0.bias" in found if found else None


def _facts_of_model(model: nn.Module, names: Mapping[str, torch.Size]) -> _Facts:
    kind = None
    stages = _count(_STAGE, names)
    if any(name.startswith("initial_queries.code.") for name in names):
        kind = "two-stage"
    elif stages > 1:
        first, second = (model.get_submodule(f"decoder.stages.{t}.head") for t in range(2))
        kind = "plain" if first is second else "refined"
    return _Facts(
        kind,
        _neck_bias(names),
        names["encoder.level_embedding"][0],
        _count(_LAYER, names),
        stages,
    )


def _facts_of_weights(weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> _Facts:
    kind = None
    stages = _count(_STAGE, weights)
    if any(name.startswith("initial_queries.code.") for name in weights):
        kind = "two-stage"
    elif "with_box_refine" in description:
        kind = "refined" if description["with_box_refine"] else "plain"
    elif stages > 1:
        # The heads of all stages are listed, whether they are one or several.
        first, second = (
            {k[len(begin) :]: v for k, v in weights.items() if k.startswith(begin)}
            for begin in ("decoder.stages.0.head.box.", "decoder.stages.1.head.box.")
        )
        same = first.keys() == second.keys() and all(
            torch.equal(first[name], second[name]) for name in first
        )
        kind = "plain" if same else "refined"
    levels = weights.get("encoder.level_embedding")
    return _Facts(
        kind,
        _neck_bias(weights),
        0 if levels is None else len(levels),
        _count(_LAYER, weights),
        stages,
    )


def _differences(theirs: _Facts, ours: _Facts) -> list[str]:
    """What makes the weights those of another Deformable DETR, and what to do."""
    found = []
    if theirs.levels != ours.levels and theirs.levels:
        cure = "these models need several levels" if theirs.levels == 1 else "set both num_levels"
        found.append(f"it is for {theirs.levels} levels (the model has {ours.levels}): {cure}")
    if theirs.kind != ours.kind and theirs.kind and ours.kind:
        found.append(
            f"it is {theirs.kind} (the model is {ours.kind}): take {_CONFIGS[theirs.kind]} or a "
            "config made of it"
        )
    for what, number, of_model, key in (
        ("stages", theirs.stages, ours.stages, "model.decoder.num_stages"),
        ("layers of the encoder", theirs.layers, ours.layers, "model.encoder.num_layers"),
    ):
        if number != of_model and number:
            found.append(f"it has {number} {what} (the model has {of_model}): set {key}={number}")
    if theirs.neck_bias != ours.neck_bias and None not in (theirs.neck_bias, ours.neck_bias):
        has, lacks = ("has", "lacks") if theirs.neck_bias else ("lacks", "has")
        found.append(
            f"its neck {has} biases (the model's {lacks} them): set model.backbone.bias="
            f"{str(theirs.neck_bias).lower()}"
        )
    return found


def _check_description(description: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse what a config.json tells of a network that weights alone do not show.

    Raises:
        CheckpointMismatchError: it is another network than the model.
    """
    kind = description.get("model_type", _MODEL_TYPE)
    if kind != _MODEL_TYPE:
        raise CheckpointMismatchError(
            f"the config.json of the checkpoint is of a model of type {kind}, not of {_MODEL_TYPE}"
        )
    wanted: dict[str, Any] = {
        "position_embedding_type": "sine",
        "activation_function": "relu",
        "dilation": False,
    }
    for part, keys in (
        ("encoder.layers.0.attention", ("encoder_attention_heads", "encoder_n_points")),
        ("decoder.stages.0.attention", ("decoder_attention_heads", "decoder_n_points")),
    ):
        attention = cast(DeformableAttention, model.get_submodule(part))
        wanted.update(zip(keys, (attention.num_heads, attention.num_points)))
    others = [
        f"{key} is {description[key]}, here {value}"
        for key, value in wanted.items()
        if key in description and (description[key] or False) != value
    ]
    if others:
        raise CheckpointMismatchError(
            "the config.json of the checkpoint tells of another Deformable DETR than the model: "
            + "; ".join(others)
        )


class DeformableDETRFormat(WeightFormat):
    """Weights of all sources.

    Where a source numbers classes by COCO's category ids, the 80 rows of the categories are taken,
    and of the proposals' class layer, which knows one class alone, the first 80. All rows are kept
    for the way back.
    """

    name = "Deformable DETR"
    sources = tuple(source.name for source in SOURCES)
    classes = COCO_CLASSES

    def recognises(self, names: Iterable[str]) -> bool:
        keys = [_bare(name) for name in names]
        return any(source.publishes(keys) for source in SOURCES)

    def describes(self, names: Iterable[str]) -> bool:
        keys = list(names)
        queries = ("initial_queries.reference_points.", "initial_queries.code.")
        return any(_LAYER.fullmatch(key) for key in keys) and any(
            key.startswith(queries) for key in keys
        )

    def to_ours(self, official_name: str) -> tuple[str, Change | None] | None:
        """Our name of a tensor of a released checkpoint, which has six stages."""
        return MMDETECTION_2.to_ours(6)(official_name)

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
        if not self.describes(wanted):
            raise CheckpointMismatchError(
                f"these are official {self.name} weights, but the model is none: choose a config "
                f"of {self.name}"
            )
        given = {_bare(name): tensor for name, tensor in state_dict.items()}
        (source, *_) = [source for source in SOURCES if source.publishes(given)]
        description = description or {}
        if source is HUGGING_FACE:
            _check_description(description, model)
            given = _packed(given)
        else:
            description = {}
        given = _with_all_heads(given, source)
        rename = source.to_ours(_proposals(given, source))
        theirs = {
            renamed[0]: tensor
            for renamed, tensor in ((rename(name), tensor) for name, tensor in given.items())
            if renamed
        }
        facts = _facts_of_model(model, wanted)
        differences = _differences(_facts_of_weights(theirs, description), facts)
        if differences:
            raise CheckpointMismatchError(
                f"the checkpoint, with the names of {source.title}, is of another Deformable DETR "
                f"than the model: {'; '.join(differences)}"
            )
        given, rows = _without_gaps(given, source, wanted)
        back = source.to_theirs(facts.stages)

        def label(name: str, official: str | None) -> str:
            known = back(name)
            return f"{official or (known[0] if known else name)} (our {name})"

        weights, extras, problems = take_weights(
            given,
            wanted,
            rename,
            is_unused=lambda name: False,
            may_differ=_RESIZABLE if allow_other_sizes else None,
            label=label,
        )
        problems.raise_if_any(
            f"weights with the names of {source.title} do not fit the model", ASK_CONFIG
        )
        return ConvertedWeights({name: weights[name] for name in wanted}, {**extras, **rows})

    def convert_back(
        self,
        weights: Mapping[str, Tensor],
        model: nn.Module,
        *,
        extras: Mapping[str, Tensor] | None = None,
        source: str = "",
    ) -> dict[str, Tensor]:
        publisher = _source(source)
        state = model.state_dict()
        Mismatch.between(weights, state).raise_if_any(
            "the weights do not fit the model", ASK_CONFIG
        )
        wanted = {name: tensor.shape for name, tensor in state.items()}
        facts = _facts_of_model(model, wanted)
        rename = publisher.to_theirs(facts.stages)
        official = {}
        nameless = []
        for name in wanted:
            renamed = rename(name)
            if renamed is None:
                nameless.append(name)
            else:
                official[renamed[0]] = weights[name]
        if nameless:
            raise CheckpointMismatchError(
                f"{some_names(nameless)} have no name in weights of {publisher.title}: only "
                "detectors with a ResNet can be converted back"
            )
        left = dict(extras or {})
        if publisher.category_ids:
            official = _with_gaps(official, left, publisher, facts)
        if publisher is HUGGING_FACE:
            official = _unpacked(official)
        official.update(
            {
                alias: official[name]
                for alias, name in publisher.with_aliases(official, facts.kind or "plain").items()
            }
        )
        counters = {
            key[: -len(".running_var")] + BATCH_COUNT
            for key in official
            if key.endswith(".running_var")
        }
        foreign = sorted(set(left) - counters)
        if foreign:
            raise CheckpointMismatchError(
                f"the extras {some_names(foreign)} do not belong to this {self.name} with the "
                f"names of {publisher.title}"
            )
        if publisher.counters:
            official.update({name: torch.tensor(0) for name in counters - set(official)})
        official.update(left)
        heads = tuple(f"{begin}." for begin in publisher.head)
        return {
            name if name.startswith(heads) else publisher.prefix + name: tensor
            for name, tensor in official.items()
        }

    def check(self, weights: Mapping[str, Tensor], model: nn.Module) -> None:
        # Else boxes would not be refined, or biases be left out, without a word.
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if not self.describes(wanted) or not self.describes(weights):
            return
        theirs, ours = _facts_of_weights(weights, {}), _facts_of_model(model, wanted)
        kinds = {theirs.kind, ours.kind}
        differences = _differences(
            ours._replace(
                kind=theirs.kind if kinds == {"plain", "refined"} else ours.kind,
                neck_bias=theirs.neck_bias or ours.neck_bias,
            ),
            ours,
        )
        if differences:
            raise CheckpointMismatchError(
                "the checkpoint is of another Deformable DETR than the model: "
                + "; ".join(differences)
            )

    def contain(self, official: Mapping[str, Tensor], *, source: str = "") -> dict[str, Any]:
        key = _source(source).container
        if key == "state_dict":
            return super().contain(official)
        return {key: dict(official)} if key else dict(official)


def _source(name: str) -> Source:
    return next(source for source in SOURCES if source.name == (name or MMDETECTION_2.name))


def _bare(name: str) -> str:
    """A name without what wrappers of a model, and Hugging Face, put before it."""
    while name.startswith(("module.", "model.")):
        name = name.partition(".")[2]
    return name


def _proposals(names: Mapping[str, Any], source: Source) -> int:
    """Index of the proposals' head, the last; -1 without proposals."""
    rename = source.to_ours(-1)
    renamed = [pair[0] for pair in map(rename, names) if pair]
    if not any(name.startswith("initial_queries.code.") for name in renamed):
        return -1
    return max(source.heads(names), default=-1)


def _with_all_heads(given: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    """The weights with the heads of all stages, however they are listed: under aliases too, or
    under these alone; all stages' as the first's, where they are one.

    Raises:
        CheckpointMismatchError: an alias has other values than what it stands for.
    """
    weights = {name: tensor for name, tensor in given.items() if source.alias_of(name) is None}
    for alias, tensor in given.items():
        name = source.alias_of(alias)
        if name is not None and not torch.equal(weights.setdefault(name, tensor), tensor):
            raise CheckpointMismatchError(
                f"{alias} and {name} are one tensor in the network of {source.title}, but have "
                "different values in the checkpoint"
            )
    rename = source.to_ours(-1)
    ours = [pair[0] for pair in map(rename, weights) if pair]
    total = _count(_STAGE, ours) + any(x.startswith("initial_queries.code.") for x in ours)
    for begin in source.head:
        names = [name for name in weights if name.startswith(f"{begin}.")]
        if names and all(name.startswith(f"{begin}.0.") for name in names):
            weights.update(
                {
                    f"{begin}.{i}{name[len(begin) + 2 :]}": weights[name]
                    for name in names
                    for i in range(1, total)
                }
            )
    return weights


def _without_gaps(
    given: Mapping[str, Tensor], source: Source, wanted: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights with class layers of 80 rows, unless 91 are wanted, and the layers of 91."""
    rows: dict[str, Tensor] = {}
    num_classes = wanted["decoder.stages.0.head.classes.bias"][0]
    if source.category_ids and num_classes != _NUM_ROWS:
        rows = {x: given[x] for x in source.class_layers(given) if len(given[x]) == _NUM_ROWS}
    last = f"{source.head[0]}.{_proposals(given, source)}."
    taken = {name: tensor[_rows(name.startswith(last))] for name, tensor in rows.items()}
    return {**given, **taken}, rows


def _rows(proposals: bool) -> list[int]:
    return list(range(80)) if proposals else list(CATEGORY_ROWS)


def _with_gaps(
    official: Mapping[str, Tensor], extras: dict[str, Tensor], source: Source, facts: _Facts
) -> dict[str, Tensor]:
    """The inverse of :func:`_without_gaps`; takes the layers of 91 rows out of ``extras``. Without
    them rows of no category are zero, their bias that of an untrained class."""
    filled = dict(official)
    for name in source.class_layers(official):
        ours = official[name]
        layer = extras.pop(name, None)
        if len(ours) != len(CATEGORY_ROWS):
            continue
        if layer is None:
            bias = -math.log((1 - SCORE_AT_START) / SCORE_AT_START) if ours.dim() == 1 else 0.0
            layer = ours.new_full((_NUM_ROWS, *ours.shape[1:]), bias)
        proposals = facts.kind == "two-stage" and name.startswith(
            f"{source.head[0]}.{facts.stages}."
        )
        filled[name] = layer.clone()
        filled[name][_rows(proposals)] = ours
    return filled


def _packed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's three projections of a self-attention as one."""
    packed = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        begin, _, part = stem.rpartition(".")
        if part not in _QKV or not begin.endswith(".self_attn"):
            packed[name] = tensor
        elif part == "q_proj":
            parts = [weights.get(f"{begin}.{x}.{kind}") for x in _QKV]
            if all(x is not None for x in parts):  # what is missing is told later
                packed[f"{begin}.in_proj_{kind}"] = torch.cat(cast(Any, parts))
    return packed


def _unpacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_packed`."""
    unpacked = {}
    for name, tensor in weights.items():
        begin, found, kind = name.partition("in_proj_")
        if found:
            for part, third in zip(_QKV, tensor.chunk(3)):
                unpacked[f"{begin}{part}.{kind}"] = third
        else:
            unpacked[name] = tensor
    return unpacked


DEFORMABLE_DETR = DeformableDETRFormat()
register_official_format(DEFORMABLE_DETR)
