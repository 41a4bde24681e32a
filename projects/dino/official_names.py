"""Names of the checkpoints that people have: of the authors' code, of detrex, of MMDetection 3.

Some names have an index that depends on the size of the network, the authors' list of classes has
gaps, and what is computed from the same weights differs in ways that no weight tells: so this is a
format of its own, with one :class:`Origin` for each code base.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deformable_detr.checkpoint import CATEGORY_ROWS
from detection_toolkit.checkpoint.name_rules import Renamer, Rule, resnet_rules, swin_rules
from detection_toolkit.checkpoint.official_format import (
    ASK_CONFIG,
    COCO_CLASSES,
    CheckpointMismatchError,
    ConvertedWeights,
    Mismatch,
    WeightFormat,
    register_official_format,
    some_names,
    take_weights,
)

__all__ = [
    "DINO_WEIGHTS",
    "DINOWeights",
    "MM_FFN",
    "ORIGINS",
    "Names",
    "Origin",
    "below",
    "box_pairs",
    "mm_layer",
    "mmdetection_pairs",
    "mmdetection_rules",
]

logger = logging.getLogger(__name__)

Pairs = list[tuple[str, str]]

_ATTENTION = [
    (f"{name}.*", f"{name}.*")
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
]


def below(official: str, ours: str, pairs: Pairs) -> Pairs:
    """Pairs of names with something ahead of each."""
    return [(official + a, ours + b) for a, b in pairs]


def box_pairs(official: str, ours: str, *, step: int) -> Pairs:
    """Linear layers that are numbered 0, 1, 2, or 0, 2, 4 as in a ``Sequential``, which ours is."""
    return [(f"{official}.{step * i}.*", f"{ours}.{2 * i}.*") for i in range(3)]


def _neck(convs: str, extra: str, conv: str, norm: str, count: int) -> Pairs:
    """One projection for each of ``count`` maps, and the extra one."""
    levels = [(convs.format(i), f"backbone.projections.{i}.") for i in range(count)]
    levels.append((extra.format(count), "backbone.extra."))
    pairs: Pairs = []
    for official, ours in levels:
        pairs += [(f"{official}.{norm}.*", ours + "norm.*"), (f"{official}.{conv}.*", ours + "*")]
    return pairs


_DINO = (("query_embedding.*", "initial_queries.content.*"),)
_DN_QUERIES = [
    ("tgt_embed.*", "initial_queries.content.*"),
    ("refpoint_embed.*", "initial_queries.box_logits.*"),
]
# A transformer of the authors' code.
_IDEA_ENCODER = [
    *below("self_attn.", "attention.", _ATTENTION),
    ("norm1.*", "norm.*"),
    ("linear{k}.*", "ffn.linear{k}.*"),
    ("norm2.*", "ffn.norm.*"),
]
_IDEA_DECODER = [
    *below("cross_attn.", "attention.", _ATTENTION),
    ("self_attn.*", "self_attention.attention.*"),
    ("norm2.*", "self_attention.norm.*"),
    ("norm1.*", "norm.*"),
    ("linear{k}.*", "ffn.linear{k}.*"),
    ("norm3.*", "ffn.norm.*"),
]
# One that MMCV, or detrex after it, puts together.
MM_FFN = [("layers.0.0.*", "ffn.linear1.*"), ("layers.1.*", "ffn.linear2.*")]


def mm_layer(self_attention: str, attention: str, ffn: str, *, of_decoder: bool) -> Pairs:
    """Pairs of names of an encoder's or a decoder's layer."""
    pairs = [
        *below(f"{attention}.", "attention.", _ATTENTION),
        *below(f"{ffn}.", "", MM_FFN),
    ]
    if not of_decoder:
        return [*pairs, ("norms.0.*", "norm.*"), ("norms.1.*", "ffn.norm.*")]
    return [
        *pairs,
        (f"{self_attention}.attn.*", "self_attention.attention.*"),
        ("norms.0.*", "self_attention.norm.*"),
        ("norms.1.*", "norm.*"),
        ("norms.2.*", "ffn.norm.*"),
    ]


def _transformer(prefix: str, level: str, encoder: Pairs, decoder: Pairs) -> Pairs:
    return [
        (prefix + level, "encoder.level_embedding"),
        *below(prefix + "encoder.layers.{i}.", "encoder.layers.{i}.", encoder),
        *below(prefix + "decoder.layers.{t}.", "decoder.stages.{t}.", decoder),
        (prefix + "decoder.norm.*", "decoder.norm.*"),
        (prefix + "decoder.ref_point_head.layers.0.*", "decoder.position.layers.0.*"),
        (prefix + "decoder.ref_point_head.layers.1.*", "decoder.position.layers.2.*"),
        (prefix + "decoder.query_scale.layers.0.*", "decoder.scale.0.*"),
        (prefix + "decoder.query_scale.layers.1.*", "decoder.scale.2.*"),
    ]


def _heads(num_stages: int, classes: str, box: str, *, step: int) -> Pairs:
    pairs: Pairs = []
    for t in range(num_stages):
        ours = f"decoder.stages.{t}.head."
        pairs += [(f"{classes.format(t)}.*", ours + "classes.*")]
        pairs += box_pairs(box.format(t), ours + "box", step=step)
    return pairs


def _rules(pairs: Pairs) -> list[Rule]:
    return [Rule(a, b) for a, b in pairs]


def _idea(projections: int, stages: int) -> list[Rule]:
    backbone = "backbone.0.body."
    resnet = [Rule(backbone + r.official[len("backbone.") :], r.ours) for r in resnet_rules()]
    pairs = [
        *_neck("input_proj.{}", "input_proj.{}", "0", "1", projections),
        *_transformer("transformer.", "level_embed", _IDEA_ENCODER, _IDEA_DECODER),
        *_heads(stages, "class_embed.{}", "bbox_embed.{}.layers", step=1),
        ("label_enc.*", "denoising.label_embedding.*"),
    ]
    return [*resnet, Rule("backbone.0.*", "backbone.bottom_up.*"), *_rules(pairs)]


def _idea_dino(projections: int, stages: int) -> list[Rule]:
    pairs = [
        ("transformer.tgt_embed.*", "initial_queries.content.*"),
        ("transformer.enc_output.*", "initial_queries.memory.*"),
        ("transformer.enc_output_norm.*", "initial_queries.memory_norm.*"),
        ("transformer.enc_out_class_embed.*", "initial_queries.head.classes.*"),
        *box_pairs("transformer.enc_out_bbox_embed.layers", "initial_queries.head.box", step=1),
    ]
    return [*_idea(projections, stages), *_rules(pairs)]


def _idea_dn(projections: int, stages: int) -> list[Rule]:
    return [*_idea(projections, stages), *_rules(_DN_QUERIES)]


def _detrex(projections: int, stages: int) -> Pairs:
    layer = {
        kind: mm_layer("attentions.0", attention, "ffns.0", of_decoder=kind == "decoder")
        for kind, attention in (("encoder", "attentions.0"), ("decoder", "attentions.1"))
    }
    return [
        *_neck("neck.convs.{}", "neck.extra_convs.0", "conv", "norm", projections),
        *_transformer("transformer.", "level_embeds", layer["encoder"], layer["decoder"]),
        *_heads(stages, "class_embed.{}", "bbox_embed.{}.layers", step=1),
        ("backbone.*", "backbone.bottom_up.*"),  # names of Detectron2
    ]


def _detrex_dino(projections: int, stages: int) -> list[Rule]:
    pairs = [
        ("transformer.tgt_embed.*", "initial_queries.content.*"),
        ("transformer.enc_output.*", "initial_queries.memory.*"),
        ("transformer.enc_output_norm.*", "initial_queries.memory_norm.*"),
        (f"class_embed.{stages}.*", "initial_queries.head.classes.*"),
        *box_pairs(f"bbox_embed.{stages}.layers", "initial_queries.head.box", step=1),
        ("label_enc.*", "denoising.label_embedding.*"),
    ]
    return _rules(_detrex(projections, stages) + pairs)


def _detrex_dn(projections: int, stages: int) -> list[Rule]:
    pairs = [
        *_DN_QUERIES,
        ("label_encoder.*", "denoising.label_embedding.*"),
        ("denoising_generator.label_encoder.*", "denoising.label_embedding.*"),
    ]
    return _rules(_detrex(projections, stages) + pairs)


def mmdetection_pairs(projections: int, stages: int) -> Pairs:
    """What MMDetection's DINO and detectors made of it have in common, but for the backbone; with
    so many maps of the backbone and stages."""
    encoder = mm_layer("", "self_attn", "ffn", of_decoder=False)
    decoder = mm_layer("self_attn", "cross_attn", "ffn", of_decoder=True)
    return [
        *_neck("neck.convs.{}", "neck.extra_convs.0", "conv", "gn", projections),
        *_transformer("", "level_embed", encoder, decoder),
        *_heads(stages, "bbox_head.cls_branches.{}", "bbox_head.reg_branches.{}", step=2),
        ("memory_trans_fc.*", "initial_queries.memory.*"),
        ("memory_trans_norm.*", "initial_queries.memory_norm.*"),
        (f"bbox_head.cls_branches.{stages}.*", "initial_queries.head.classes.*"),
        *box_pairs(f"bbox_head.reg_branches.{stages}", "initial_queries.head.box", step=2),
        ("dn_query_generator.label_embedding.*", "denoising.label_embedding.*"),
    ]


def mmdetection_rules(
    projections: int, stages: int, others: Sequence[tuple[str, str]] = _DINO
) -> list[Rule]:
    """Pairs of names of a detector of MMDetection.

    Args:
        projections, stages: see :func:`mmdetection_pairs`.
        others: pairs of what is its own; by default DINO's.
    """
    pairs = [*mmdetection_pairs(projections, stages), *others]
    return [*resnet_rules(), *swin_rules(), *_rules(pairs)]


@dataclass(frozen=True)
class Origin:
    """A code base, and what its weights are computed with."""

    source: str
    """Short name, for the command line."""
    name: str
    """For messages."""
    mark: str
    """Regular expression that only the names of its checkpoints match."""
    rules: Callable[[int, int], list[Rule]]
    """(maps of the backbone, stages) -> pairs of names."""
    repeated: str = "(?!)"
    """Regular expression of names in the decoder that repeat those without ``transformer.decoder.``
    before them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the model's config that no weight tells."""
    certain: bool = True
    """Whether all its models have these settings."""
    is_dino: bool = True
    """Or DN-Deformable-DETR."""
    has_gaps: bool = False
    """Whether its classes are COCO's category ids."""
    has_spare_label: bool = False
    """Whether its label embedding has a row more, which stands for no class."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Pairs of what a name may begin with that repeats another, and what that begins with."""

    def mark_matches(self, names: Iterable[str]) -> bool:
        """Whether the mark is among the names."""
        pattern = re.compile(rf"(module\.)?({self.mark})")
        return any(pattern.fullmatch(name) for name in names)


_HEAD_NAMES = r"(class_embed|bbox_embed)\..*"
_FINE = {"model.encoder.position_temperature": 20, "model.encoder.position_offset": 0.0}
_COARSE = {"model.encoder.position_temperature": 10000, "model.encoder.position_offset": -0.5}
_EPS = "model.decoder.prediction_eps"

ORIGINS = (
    Origin(
        "original",
        "the authors' DINO",
        r"transformer\.enc_out_class_embed\..*",
        _idea_dino,
        repeated=_HEAD_NAMES,
        settings={**_FINE, _EPS: 1e-3},
        has_gaps=True,
        has_spare_label=True,
    ),
    Origin(
        "detrex",
        "detrex's DN-Deformable-DETR",
        r"(denoising_generator\.)?label_encoder\.weight",
        _detrex_dn,
        is_dino=False,
        has_spare_label=True,
        repeated=r"bbox_embed\..*",
        settings=_COARSE,
    ),
    Origin(
        "original",
        "the authors' DN-Deformable-DETR",
        r"refpoint_embed\.weight",  # those of detrex have it, too: they come first
        _idea_dn,
        is_dino=False,
        repeated=r"bbox_embed\..*",
        settings=_COARSE,
        has_gaps=True,
        has_spare_label=True,
    ),
    Origin(
        "detrex",
        "detrex's DINO",
        r"transformer\.tgt_embed\.weight",  # the authors' models have it, too: they come first
        _detrex_dino,
        repeated=_HEAD_NAMES,
        settings={**_COARSE, _EPS: 1e-3},
    ),
    Origin(
        "mmdetection3",
        "MMDetection's DINO",
        r"dn_query_generator\.label_embedding\.weight",
        mmdetection_rules,
        settings={**_FINE, _EPS: 1e-5},
        certain=False,  # its improved DINO has other position codes
    ),
)


class Names:
    """The pairs of names of an origin for the size of a model."""

    def __init__(self, origin: Origin, model_names: Iterable[str]):
        names = list(model_names)
        projections = _count(r"backbone\.projections\.(\d+)\..*", names)
        self.num_stages = _count(r"decoder\.stages\.(\d+)\..*", names)
        rules = origin.rules(projections, self.num_stages)
        self._origin = origin
        self._to_ours = Renamer((r.official, r.ours, r.to_ours) for r in rules)
        self.to_official = Renamer((r.ours, r.official, r.to_official) for r in rules)

    def to_ours(self, official: str) -> tuple[str, Any] | None:
        """Our name and what changes the tensor; None if there is none."""
        return self._to_ours(self.original(official))

    def original(self, official: str) -> str:
        """The name that an official name repeats, or the name itself."""
        for begin, original in self._origin.aliases:
            if official.startswith(begin):
                return original + official[len(begin) :]
        prefix = "transformer.decoder."
        rest = official[len(prefix) :]
        repeats = official.startswith(prefix) and re.fullmatch(self._origin.repeated, rest)
        return rest if repeats else official

    def repetition(self, official: str) -> str | None:
        """The other name of a tensor, if it has one."""
        repeats = re.fullmatch(self._origin.repeated, official)
        return f"transformer.decoder.{official}" if repeats else None


class DINOWeights(WeightFormat):
    """Weights of DINO and DN-Deformable-DETR.

    Where no source is named on the way back, it is the one whose model is like this: with one head
    for all stages the authors', with one for each detrex, and without a bias in the neck
    MMDetection. DN-Deformable-DETR is the authors'.
    """

    name = "DINO"
    sources: tuple[str, ...] = ("original", "detrex", "mmdetection3")
    origins: tuple[Origin, ...] = ORIGINS
    configs = "dino/"
    """Folder of the configs that the weights are for."""
    classes = COCO_CLASSES

    def recognises(self, names: Iterable[str]) -> bool:
        return self.origin_of(names) is not None

    def origin_of(self, names: Iterable[str]) -> Origin | None:
        """The code base whose names these are."""
        keys = list(names)
        return next((origin for origin in self.origins if origin.mark_matches(keys)), None)

    def origin_for(self, model: nn.Module, source: str) -> Origin:
        """The code base of that source, or, where it is empty, the one whose model is like this.

        Raises:
            CheckpointMismatchError: the source has no such model.
        """
        return _origin_for(model, source)

    def describes(self, names: Iterable[str]) -> bool:
        return any(name.startswith("decoder.position.layers.") for name in names)

    def convert(
        self,
        state_dict: Mapping[str, Tensor],
        model: nn.Module,
        *,
        allow_other_sizes: bool = False,
        require_unused: bool = False,
        description: Mapping[str, Any] | None = None,
    ) -> ConvertedWeights:
        origin = self.origin_of(state_dict)
        assert origin is not None
        wanted = {key: value.shape for key, value in model.state_dict().items()}
        if not self.describes(wanted):
            raise CheckpointMismatchError(
                f"these are weights of {origin.name}, but the model is none of its kind: choose a "
                f"config of {self.configs}"
            )
        _check_settings(origin, model)
        names = Names(origin, wanted)
        problems = _differing(state_dict, names)
        taken, extras = {}, {}
        for name, value in state_dict.items():
            if names.original(name) != name and names.original(name) in state_dict:
                continue
            renamed = names.to_ours(name)
            shape = wanted.get(renamed[0]) if renamed else None
            rows = _rows_of(origin, name, value, shape)
            if rows is not None:
                extras[name], value = value, value[list(rows)]
            taken[name] = value

        def label(name: str, official: str | None) -> str:
            known = official or (names.to_official(name) or [""])[0]
            return f"{known} (our {name})" if known else name

        weights, counters, found = take_weights(
            taken,
            wanted,
            names.to_ours,
            # A model without denoising has no place for its embedding.
            is_unused=lambda name: (names.to_ours(name) or [""])[0].startswith("denoising."),
            # What a decoder has beyond that of the weights keeps its initialisation.
            is_required=lambda name: (
                not name.startswith("decoder.") or names.to_official(name) is not None
            ),
            may_differ=_RESIZABLE if allow_other_sizes else None,
            label=label,
        )
        found.shapes += [*problems, *_not_shared(weights, model)]
        found.raise_if_any(f"weights of {origin.name} do not fit the model", ASK_CONFIG)
        return ConvertedWeights(
            {name: weights[name] for name in wanted if name in weights}, {**extras, **counters}
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
        Mismatch.between(weights, wanted).raise_if_any(
            "the weights do not fit the model", ASK_CONFIG
        )
        origin = self.origin_for(model, source)
        names, extras = Names(origin, wanted), dict(extras or {})
        official: dict[str, Tensor] = {}
        nameless = []
        for name in wanted:
            renamed = names.to_official(name)
            if renamed is None:
                nameless.append(name)
                continue
            key, change = renamed
            value = weights[name] if change is None else change(weights[name])
            official[key] = _with_gaps(origin, key, value, extras.pop(key, None))
            repetition = names.repetition(key)
            if repetition:
                official[repetition] = official[key]
        if nameless:
            raise CheckpointMismatchError(
                f"{some_names(nameless)} have no name in checkpoints of {origin.name}"
            )
        foreign = sorted(key for key in extras if names.to_ours(key) is None)
        if foreign:
            raise CheckpointMismatchError(
                f"the extras {some_names(foreign)} do not belong to this model of {origin.name}"
            )
        return {**official, **extras}

    def contain(self, official: Mapping[str, Tensor], *, source: str = "") -> dict[str, Any]:
        if self.origins[-1].mark_matches(official):
            return super().contain(official)
        return {"model": dict(official)}


_RESIZABLE = re.compile(
    r"(decoder|initial_queries)\.(.*\.)?classes\..*"
    r"|initial_queries\.(content|box_logits)\.weight|denoising\.label_embedding\.weight"
)


def _count(pattern: str, names: Iterable[str]) -> int:
    found = (re.fullmatch(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _origin_for(model: nn.Module, source: str) -> Origin:
    """The code base of that source, or, where it is empty, the one whose model is like this one.

    Raises:
        CheckpointMismatchError: the source has no such model.
    """
    names = set(model.state_dict())
    is_dino = any(name.startswith("decoder.norm.") for name in names)
    shared, bias = getattr(model.decoder, "shared_head", False), "backbone.extra.bias" in names
    if not source:
        source = "original" if shared or not is_dino else "detrex" if bias else "mmdetection3"
    for origin in ORIGINS:
        if origin.source == source and origin.is_dino == is_dino:
            break
    else:
        raise CheckpointMismatchError(f"{source} has no weights of DN-Deformable-DETR")
    if is_dino and (shared, bias) != (origin.source == "original", origin.source != "mmdetection3"):
        raise CheckpointMismatchError(
            f"the model is unlike {origin.name}, which has "
            + ("one head for all stages" if origin.source == "original" else "a head a stage")
            + f" and {'no' if origin.source == 'mmdetection3' else 'a'} bias in the neck"
        )
    return origin


def _check_settings(origin: Origin, model: nn.Module) -> None:
    wrong = []
    for key, expected in origin.settings.items():
        part, entry = key.split(".")[1:]
        if getattr(getattr(model, part), entry) != expected:
            wrong.append(f"{key}={expected}")
    if not wrong:
        return
    advice = f"weights of {origin.name} are computed with {' '.join(wrong)}"
    if origin.certain:
        raise CheckpointMismatchError(f"{advice}, which the config has otherwise")
    logger.warning("%s as a rule, which the config has otherwise", advice)


def _differing(state_dict: Mapping[str, Tensor], names: Names) -> list[str]:
    """Names of a tensor that hold other numbers than its first one."""
    return [
        f"{name} is not {original}, which it repeats"
        for name, value in state_dict.items()
        for original in [names.original(name)]
        if original != name and original in state_dict
        if not torch.equal(value, state_dict[original])
    ]


def _not_shared(weights: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Names of the heads that are not the first one, where the model has one for all stages."""
    if not getattr(model.decoder, "shared_head", False):
        return []
    pattern = re.compile(r"decoder\.stages\.(\d+)\.head\.(.*)")
    found = {name: match for name in weights for match in [pattern.fullmatch(name)] if match}
    first = {match[2]: weights[name] for name, match in found.items() if match[1] == "0"}
    return [
        f"{name} is not that of the first stage: set model.decoder.shared_head=false"
        for name, match in found.items()
        if match[2] in first and not torch.equal(weights[name], first[match[2]])
    ]


_CLASS_ROWS = re.compile(
    r"(transformer\.decoder\.)?class_embed\.\d+\..*|transformer\.enc_out_class_embed\..*"
)
_LABEL_ROWS = re.compile(r"label_enc\.weight|(denoising_generator\.)?label_encoder\.weight")


def _rows_of(
    origin: Origin, name: str, value: Tensor, wanted: torch.Size | None
) -> Iterable[int] | None:
    """The rows of a tensor that are of use; None for all."""
    is_embedding = _LABEL_ROWS.fullmatch(name)
    if wanted is None or not (is_embedding or _CLASS_ROWS.fullmatch(name)):
        return None
    num_rows, num_classes = value.shape[0], wanted[0]
    if origin.has_gaps and num_rows in (91, 92) and num_rows - num_classes not in (0, 1):
        return CATEGORY_ROWS
    if is_embedding and (num_rows == num_classes + 1 or origin.has_spare_label):
        return range(num_rows - 1) if num_rows != num_classes else None
    return None


def _with_gaps(origin: Origin, name: str, value: Tensor, full: Tensor | None) -> Tensor:
    """A tensor with the rows that ours lacks: as they were, or zeros."""
    is_embedding = _LABEL_ROWS.fullmatch(name)
    if not is_embedding and not _CLASS_ROWS.fullmatch(name):
        return value
    num_classes = value.shape[0]
    if full is None:
        has_gaps = origin.has_gaps and num_classes == len(CATEGORY_ROWS)
        num_rows = 91 if has_gaps else num_classes
        spare = is_embedding is not None and origin.has_spare_label
        full = value.new_zeros(num_rows + spare, *value.shape[1:])
    rows = _rows_of(origin, name, full, value.shape)
    if rows is None:
        return value
    result = full.clone()
    result[list(rows)] = value
    return result


DINO_WEIGHTS = DINOWeights()
register_official_format(DINO_WEIGHTS)
