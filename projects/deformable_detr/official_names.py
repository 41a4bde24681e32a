"""What those who publish Deformable DETRs call its tensors.

Letters in templates: i a layer of the encoder, t a stage, l a level.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from detection_toolkit.checkpoint.name_rules import Renamer, Rule, resnet_rules

__all__ = [
    "DETREX",
    "HUGGING_FACE",
    "MMDETECTION_2",
    "MMDETECTION_3",
    "ORIGINAL",
    "SOURCES",
    "Source",
]

_ENCODER = ("attention.*", "norm.*", "ffn.linear1.*", "ffn.linear2.*", "ffn.norm.*")
_DECODER = (
    "self_attention.attention.*",
    "self_attention.norm.*",
    "attention.*",
    "norm.*",
    "ffn.linear1.*",
    "ffn.linear2.*",
    "ffn.norm.*",
)
_REST = (
    "encoder.level_embedding",
    "initial_queries.embedding.*",
    "initial_queries.reference_points.*",
    "initial_queries.memory.*",
    "initial_queries.memory_norm.*",
    "initial_queries.code.*",
    "initial_queries.code_norm.*",
)


@dataclass(frozen=True)
class Source:
    """Whoever publishes weights.

    Attributes:
        name: for the command line.
        title: for messages.
        marks: regular expressions; a file is of this source if each matches one of its names.
        backbone: pairs of names.
        neck: what their names of a level's convolution and norm are, {} being its number; then of
            the additional level.
        encoder, decoder: what their names of a layer begin with, and go on.
        rest: of what there is once.
        head: what the names of a head's class layer, and of its box layers, begin with.
        box_layers: their names of the three.
        aliases: beginnings of names under which heads are listed once more, for the class layers
            and for the box layers.
        category_ids: whether their classes are COCO's category ids, 91 rows.
        counters: whether their frozen batch norms have counters.
        container: the key under which a file has the weights; empty: it has nothing else.
        prefix: of all names but those of heads.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    backbone: tuple[tuple[str, str], ...]
    neck: tuple[str, str, str, str]
    encoder: tuple[str, tuple[str, ...]]
    decoder: tuple[str, tuple[str, ...]]
    rest: tuple[str, ...]
    head: tuple[str, str]
    box_layers: tuple[str, str, str]
    aliases: tuple[str, str] = ("", "")
    category_ids: bool = False
    counters: bool = False
    container: str = "model"
    prefix: str = ""

    def publishes(self, names: Iterable[str]) -> bool:
        """Whether names of tensors are this source's."""
        keys = list(names)
        return all(any(re.fullmatch(mark, key) for key in keys) for mark in self.marks)

    def to_ours(self, proposals: int) -> Renamer:
        """
        Args:
            proposals: index of the proposals' head, -1 where there is none.
        """
        return _renamers(self, proposals)[0]

    def to_theirs(self, proposals: int) -> Renamer:
        """The inverse of :meth:`to_ours`."""
        return _renamers(self, proposals)[1]

    def heads(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Names of the tensors of each head, by its index."""
        begin = re.compile("(?:{}|{})".format(*map(re.escape, self.head)) + r"\.(\d+)\.")
        found: dict[int, list[str]] = {}
        for name in names:
            match = begin.match(name)
            if match:
                found.setdefault(int(match.group(1)), []).append(name)
        return found

    def class_layers(self, names: Iterable[str]) -> list[str]:
        """Names of the heads' class layers."""
        return [name for name in names if name.startswith(f"{self.head[0]}.")]

    def with_aliases(self, weights: Mapping[str, object], kind: str) -> dict[str, str]:
        """Alias -> name of the heads' tensors that their network lists twice, by its kind."""
        wanted = {"plain": (), "refined": (1,), "two-stage": (0, 1)}[kind]
        return {
            self.aliases[part] + name[len(self.head[part]) :]: name
            for part in wanted
            if self.aliases[part]
            for name in weights
            if name.startswith(f"{self.head[part]}.")
        }

    def alias_of(self, name: str) -> str | None:
        """The name of what is listed under an alias; None if it is none."""
        for alias, head in zip(self.aliases, self.head):
            if alias and name.startswith(f"{alias}."):
                return head + name[len(alias) :]
        return None


@functools.cache
def _renamers(source: Source, proposals: int) -> tuple[Renamer, Renamer]:
    rules = _rules(source, proposals)
    return (
        Renamer((r.official, r.ours, None) for r in rules),
        Renamer((r.ours, r.official, None) for r in rules),
    )


def _rules(source: Source, proposals: int) -> list[Rule]:
    conv, norm, extra_conv, extra_norm = source.neck
    rules = [
        *(Rule(a, b) for a, b in source.backbone),
        Rule(f"{extra_norm}.*", "backbone.extra.norm.*"),
        Rule(f"{extra_conv}.*", "backbone.extra.*"),
        Rule(f"{norm}.*", "backbone.projections.{l}.norm.*"),
        Rule(f"{conv}.*", "backbone.projections.{l}.*"),
        *map(Rule, source.rest, _REST),
    ]
    for (begin, parts), ours, our_parts in (
        (source.encoder, "encoder.layers.{i}.", _ENCODER),
        (source.decoder, "decoder.stages.{t}.", _DECODER),
    ):
        rules += [Rule(begin + a, ours + b) for a, b in zip(parts, our_parts)]
    classes, boxes = source.head
    for index, ours in ((str(proposals), "initial_queries."), ("{t}", "decoder.stages.{t}.")):
        if index != "-1":
            rules += [
                Rule(f"{classes}.{index}.*", f"{ours}head.classes.*"),
                *(
                    Rule(f"{boxes}.{index}.{layer}.*", f"{ours}head.box.{2 * k}.*")
                    for k, layer in enumerate(source.box_layers)
                ),
            ]
    return rules


def _resnet(prefix: str) -> tuple[tuple[str, str], ...]:
    """A ResNet of torchvision, whose names are preceded by a prefix."""
    begin = len("backbone.")
    return tuple((prefix + rule.official[begin:], rule.ours) for rule in resnet_rules())


_MMCV_NECK = (
    "neck.convs.{l}.conv",
    "neck.convs.{l}.gn",
    "neck.extra_convs.0.conv",
    "neck.extra_convs.0.gn",
)
_MMCV_HEAD = ("bbox_head.cls_branches", "bbox_head.reg_branches")
_MMCV_BOXES = ("0", "2", "4")
_MMCV_ENCODER = (
    "attentions.0.*",
    "norms.0.*",
    "ffns.0.layers.0.0.*",
    "ffns.0.layers.1.*",
    "norms.1.*",
)
_MMCV_DECODER = (
    "attentions.0.attn.*",
    "norms.0.*",
    "attentions.1.*",
    "norms.1.*",
    "ffns.0.layers.0.0.*",
    "ffns.0.layers.1.*",
    "norms.2.*",
)
# The original project lists the proposals' parts like this, and others keep it.
_PROPOSALS = (
    "transformer.enc_output.*",
    "transformer.enc_output_norm.*",
    "transformer.pos_trans.*",
    "transformer.pos_trans_norm.*",
)
_HEAD = ("class_embed", "bbox_embed")
_BOXES = ("layers.0", "layers.1", "layers.2")
_ALIASES = ("transformer.decoder.class_embed", "transformer.decoder.bbox_embed")
# One of them tells Deformable DETR from other detectors that have its encoder, such as DINO.
_QUERIES = r"transformer\.(reference_points|pos_trans)\..*"

MMDETECTION_2 = Source(
    "mmdetection2",
    "MMDetection 2",
    (r"bbox_head\.transformer\.encoder\.layers\.\d+\.attentions\.0\.sampling_offsets\..*",),
    _resnet("backbone."),
    _MMCV_NECK,
    ("bbox_head.transformer.encoder.layers.{i}.", _MMCV_ENCODER),
    ("bbox_head.transformer.decoder.layers.{t}.", _MMCV_DECODER),
    (
        "bbox_head.transformer.level_embeds",
        "bbox_head.query_embedding.*",
        "bbox_head.transformer.reference_points.*",
        *(f"bbox_head.{name}" for name in _PROPOSALS),
    ),
    _MMCV_HEAD,
    _MMCV_BOXES,
    counters=True,
    container="state_dict",
)
MMDETECTION_3 = Source(
    "mmdetection3",
    "MMDetection 3",
    (
        r"encoder\.layers\.\d+\.self_attn\.sampling_offsets\..*",
        r"(reference_points_fc|pos_trans_fc)\..*",
    ),
    _resnet("backbone."),
    _MMCV_NECK,
    (
        "encoder.layers.{i}.",
        ("self_attn.*", "norms.0.*", "ffn.layers.0.0.*", "ffn.layers.1.*", "norms.1.*"),
    ),
    (
        "decoder.layers.{t}.",
        (
            "self_attn.attn.*",
            "norms.0.*",
            "cross_attn.*",
            "norms.1.*",
            "ffn.layers.0.0.*",
            "ffn.layers.1.*",
            "norms.2.*",
        ),
    ),
    (
        "level_embed",
        "query_embedding.*",
        "reference_points_fc.*",
        "memory_trans_fc.*",
        "memory_trans_norm.*",
        "pos_trans_fc.*",
        "pos_trans_norm.*",
    ),
    _MMCV_HEAD,
    _MMCV_BOXES,
    counters=True,
    container="state_dict",
)
ORIGINAL = Source(
    "original",
    "the original repository",
    (r"transformer\.encoder\.layers\.\d+\.self_attn\.sampling_offsets\..*", _QUERIES),
    _resnet("backbone.0.body."),
    ("input_proj.{l}.0", "input_proj.{l}.1", "input_proj.3.0", "input_proj.3.1"),
    (
        "transformer.encoder.layers.{i}.",
        ("self_attn.*", "norm1.*", "linear1.*", "linear2.*", "norm2.*"),
    ),
    (
        "transformer.decoder.layers.{t}.",
        # Numbered by the module they were written for, not by their place.
        (
            "self_attn.*",
            "norm2.*",
            "cross_attn.*",
            "norm1.*",
            "linear1.*",
            "linear2.*",
            "norm3.*",
        ),
    ),
    ("transformer.level_embed", "query_embed.*", "transformer.reference_points.*", *_PROPOSALS),
    _HEAD,
    _BOXES,
    aliases=_ALIASES,
    category_ids=True,
)
DETREX = Source(
    "detrex",
    "detrex",
    (r"transformer\.encoder\.layers\.\d+\.attentions\.0\.sampling_offsets\..*", _QUERIES),
    (
        ("backbone.stem.*", "backbone.bottom_up.stem.*"),
        ("backbone.res{i}.*", "backbone.bottom_up.res{i}.*"),
    ),
    (
        "neck.convs.{l}.conv",
        "neck.convs.{l}.norm",
        "neck.extra_convs.0.conv",
        "neck.extra_convs.0.norm",
    ),
    ("transformer.encoder.layers.{i}.", _MMCV_ENCODER),
    ("transformer.decoder.layers.{t}.", _MMCV_DECODER),
    (
        "transformer.level_embeds",
        "query_embedding.*",
        "transformer.reference_points.*",
        *_PROPOSALS,
    ),
    _HEAD,
    _BOXES,
    aliases=_ALIASES,
)
HUGGING_FACE = Source(
    "huggingface",
    "Hugging Face",
    (
        r"encoder\.layers\.\d+\.self_attn\.sampling_offsets\..*",
        r"decoder\.layers\.\d+\.encoder_attn\.sampling_offsets\..*",
        r"(reference_points|pos_trans)\..*",
    ),
    _resnet("backbone.conv_encoder.model."),
    ("input_proj.{l}.0", "input_proj.{l}.1", "input_proj.3.0", "input_proj.3.1"),
    (
        "encoder.layers.{i}.",
        ("self_attn.*", "self_attn_layer_norm.*", "fc1.*", "fc2.*", "final_layer_norm.*"),
    ),
    (
        "decoder.layers.{t}.",
        (
            "self_attn.*",
            "self_attn_layer_norm.*",
            "encoder_attn.*",
            "encoder_attn_layer_norm.*",
            "fc1.*",
            "fc2.*",
            "final_layer_norm.*",
        ),
    ),
    (
        "level_embed",
        "query_position_embeddings.*",
        "reference_points.*",
        "enc_output.*",
        "enc_output_norm.*",
        "pos_trans.*",
        "pos_trans_norm.*",
    ),
    _HEAD,
    _BOXES,
    aliases=("decoder.class_embed", "decoder.bbox_embed"),
    category_ids=True,
    container="",
    prefix="model.",
)
SOURCES = (MMDETECTION_2, MMDETECTION_3, ORIGINAL, DETREX, HUGGING_FACE)
