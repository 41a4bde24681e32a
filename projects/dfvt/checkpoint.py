"""Official DFvT checkpoints: weights under the authors' names -> ours, and back.

Three kinds of files exist: the ImageNet classifier, the detection backbone alone, and the whole
Mask R-CNN of the authors' MMDetection branch, where the backbone's names start with ``backbone.``.
Values are never changed, but for tables of relative biases of another window size, which are
resized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection_toolkit.checkpoint.name_rules import Change, Rule
from detection_toolkit.checkpoint.official_format import (
    COCO_CLASSES,
    CheckpointMismatchError,
    ConvertedWeights,
    OfficialFormat,
    WeightFormat,
    register_official_format,
    rename_back,
    some_names,
    take_weights,
)

from .backbone import DFvTBackbone
from .classifier import DFvTClassifier
from .layers import relative_position_index, shift_mask
from .network import NUM_STAGES, DFvTNetwork, Stage

__all__ = [
    "check_variant",
    "convert_official_state_dict",
    "convert_to_official",
    "is_official_state_dict",
    "variant_of",
]

_BIAS_TABLE = ".attention.bias_table"
_MARK = "patch_embed.proj1.weight"
_STEM = "stem.conv1.weight"
_OUR_MARK = f"network.{_STEM}"
_BLOCK = re.compile(r"stages\.([0-3])\.blocks\.(\d+)\.")
_OFFICIAL_BLOCK = re.compile(r"(?:backbone\.)?layers\.([0-3])\.blocks\.(\d+)\.norm1\.weight")
_IMAGENET_SIZE = 224


def _conv_norm(official_conv: str, official_norm: str, ours: str) -> list[tuple[str, str]]:
    pairs = [(f"{official_conv}.{p}", f"{ours}.{p}") for p in ("weight", "bias")]
    return [*pairs, (f"{official_norm}.*", f"{ours}.norm.*")]


def _network_pairs() -> list[tuple[str, str]]:
    # The authors' second norm of the stem is called "norm", the first one "norm1".
    pairs = _conv_norm("patch_embed.proj1", "patch_embed.norm1", "stem.conv1")
    pairs += _conv_norm("patch_embed.proj2", "patch_embed.norm", "stem.conv2")
    local, ours = "convlayers.{i}.", "stages.{i}."
    for k in range(3):
        pairs += _conv_norm(
            f"{local}conv1x1_1.{3 * k}", f"{local}conv1x1_1.{3 * k + 1}", f"{ours}local.{k}"
        )
    for k, name in enumerate(("conv1", "conv1x1_2")):
        pairs += _conv_norm(f"{local}{name}.0", f"{local}{name}.1", f"{ours}reduce.{k}")
    spatial = "multiresolution_conv.{i}."
    pairs += _conv_norm(spatial + "0", spatial + "1", ours + "spatial.depthwise")
    pairs += _conv_norm(spatial + "2", spatial + "3", ours + "spatial.pointwise")
    pairs += [("layers.{i}.downsample.norm.*", "widen.{i}.0.*")]
    pairs += [("layers.{i}.downsample.reduction.*", "widen.{i}.1.*")]
    block, ours = "layers.{i}.blocks.{j}.", "stages.{i}.blocks.{j}."
    return pairs + [
        (block + official, ours + name)
        for official, name in (
            ("norm1.*", "norm1.*"),
            ("attn.qkv.*", "attention.qkv.*"),
            ("attn.proj.*", "attention.proj.*"),
            ("attn.relative_position_bias_table", "attention.bias_table"),
            ("select.fc_spatial.{k}.*", "dane.token_gate.{k}.*"),
            ("select.fc_channel.{k}.*", "dane.channel_gate.{k}.*"),
            ("norm2.*", "norm2.*"),
            ("mlp.fc1.*", "mlp.0.*"),
            ("mlp.fc2.*", "mlp.2.*"),
        )
    ]


def _format(
    name: str, pairs: Sequence[tuple[str, str]], *, prefix: str, ours: str
) -> OfficialFormat:
    """The names of one kind of file; ``prefix`` and ``ours`` stand before the network's."""
    network = [(prefix + a, f"{ours}network.{b}") for a, b in _network_pairs()]
    block = prefix + "layers.{i}.blocks.{j}."
    return OfficialFormat(
        name,
        [Rule(a, b) for a, b in [*network, *pairs]],
        mark=re.escape(prefix + _MARK),
        our_mark=re.escape(ours + _OUR_MARK),
        # Computed anew, as they depend on the sizes of windows and images.
        unused=[block + "attn_mask", block + "attn.relative_position_index"],
    )


def _output_pairs(prefix: str, ours: str) -> list[tuple[str, str]]:
    pairs = []
    for i in range(4):
        pairs.append((f"{prefix}norm{i}.*", f"{ours}outputs.res{i + 2}.norm.*"))
        pairs.append((f"{prefix}conv1x1layers.{i}.*", f"{ours}outputs.res{i + 2}.fuse.*"))
    return pairs


def _detector_pairs() -> list[tuple[str, str]]:
    """Neck and heads: MMDetection's Mask R-CNN against Detectron2's."""
    pairs = []
    for i in range(4):
        pairs.append((f"neck.lateral_convs.{i}.conv.*", f"backbone.fpn_lateral{i + 2}.*"))
        pairs.append((f"neck.fpn_convs.{i}.conv.*", f"backbone.fpn_output{i + 2}.*"))
        pairs.append(
            (f"roi_head.mask_head.convs.{i}.conv.*", f"roi_heads.mask_head.mask_fcn{i + 1}.*")
        )
    return pairs + [
        ("rpn_head.rpn_conv.*", "proposal_generator.rpn_head.conv.*"),
        ("rpn_head.rpn_cls.*", "proposal_generator.rpn_head.objectness_logits.*"),
        ("rpn_head.rpn_reg.*", "proposal_generator.rpn_head.anchor_deltas.*"),
        ("roi_head.bbox_head.shared_fcs.0.*", "roi_heads.box_head.fc1.*"),
        ("roi_head.bbox_head.shared_fcs.1.*", "roi_heads.box_head.fc2.*"),
        ("roi_head.bbox_head.fc_cls.*", "roi_heads.box_predictor.cls_score.*"),
        ("roi_head.bbox_head.fc_reg.*", "roi_heads.box_predictor.bbox_pred.*"),
        ("roi_head.mask_head.upsample.*", "roi_heads.mask_head.deconv.*"),
        ("roi_head.mask_head.conv_logits.*", "roi_heads.mask_head.predictor.*"),
    ]


_CLASSIFIER = _format(
    "DFvT classifier", [("norm.*", "norm.*"), ("head.*", "head.*")], prefix="", ours=""
)
_BACKBONE = _format("DFvT backbone", _output_pairs("", ""), prefix="", ours="")
_DETECTOR_PREFIX = "backbone.bottom_up."
_DETECTOR = _format(
    "Mask R-CNN with DFvT",
    [*_output_pairs("backbone.", _DETECTOR_PREFIX), *_detector_pairs()],
    prefix="backbone.",
    ours=_DETECTOR_PREFIX,
)
_KINDS = (_CLASSIFIER, _BACKBONE, _DETECTOR)
_OUTPUT = re.compile(r"(.*\.)?outputs\.res\d\..*")
_CLASS_LAYER = re.compile(
    r"roi_heads\.(box_predictor\.(cls_score|bbox_pred)|mask_head\.predictor)\..*|head\..*"
)


def is_official_state_dict(keys: Iterable[str]) -> bool:
    """Whether the names are those of an official DFvT checkpoint, of any kind."""
    names = list(keys)
    return any(kind.recognises(names) for kind in _KINDS)


def variant_of(state_dict: Mapping[str, Tensor]) -> str:
    """Width and depths of the network that official weights belong to, in words.

    >>> variant_of(...)
    'embed_dim 96, depths (1, 1, 2, 1)'
    """
    weight = state_dict.get(f"backbone.{_MARK}", state_dict.get(_MARK))
    width = None if weight is None else 2 * weight.shape[0]
    return _variant(width, _depths(_OFFICIAL_BLOCK, state_dict))


def _variant(width: int | str | None, depths: Sequence[int]) -> str:
    return f"embed_dim {width}, depths {tuple(depths)}"


def _depths(block: re.Pattern[str], names: Iterable[str]) -> list[int]:
    """Blocks of each stage, by the names of their tensors."""
    depths = [0] * NUM_STAGES
    for match in filter(None, map(block.match, names)):
        stage = int(match.group(1))
        depths[stage] = max(depths[stage], int(match.group(2)) + 1)
    return depths


def convert_official_state_dict(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    *,
    allow_other_classes: bool = False,
) -> dict[str, Tensor]:
    """Official weights -> weights for a classifier, a backbone or a detector.

    What fits together:

    ================  =====================  ======================================================
    file              model                  result
    ================  =====================  ======================================================
    classifier        ``DFvTClassifier``     everything; loads strictly
    backbone          ``DFvTBackbone``       everything; loads strictly
    classifier        ``DFvTBackbone``       all but ``outputs.*``, which keep their initial values
    Mask R-CNN        ``DFvTBackbone``       the backbone's part; loads strictly
    Mask R-CNN        Mask R-CNN             everything; loads strictly
    any               any other detector     ``backbone.bottom_up.*`` as for the backbone
    ================  =====================  ======================================================

    Index tables and attention masks in the file are computed anew, and so dropped. Tables of
    relative biases are resized bicubically for windows of another size.

    Args:
        state_dict: weights under the official names.
        model: what they are for; the meta device is enough.
        allow_other_classes: accept class layers of another shape. Their tensors are converted all
            the same; the caller leaves them out.

    Raises:
        CheckpointMismatchError: an unknown, missing or surplus tensor, or a wrong shape, as when
            the weights are those of another variant; the message names both variants.
    """
    if not is_official_state_dict(state_dict):
        some = ", ".join(list(state_dict)[:4])
        raise CheckpointMismatchError(
            f"these are no official DFvT weights: none of the {len(state_dict)} tensors is "
            f"{_MARK}; they are {some}, ..."
        )
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    kind = _kind_of(state_dict)
    to_name, is_required = _plan(kind, model, wanted)

    def rename(key: str) -> tuple[str, Change | None] | None:
        name = to_name(key)
        if name is None or not name.endswith(_BIAS_TABLE) or name not in wanted:
            return None if name is None else (name, None)
        return name, partial(_resize_bias_table, shape=wanted[name])

    weights, _, problems = take_weights(
        {key: value for key, value in state_dict.items() if to_name(key) != _DROPPED},
        wanted,
        rename,
        is_unused=kind.is_unused,
        is_required=is_required,
        may_differ=_CLASS_LAYER if allow_other_classes else None,
        label=lambda name, official: official or name,
    )
    problems.raise_if_any(_difference(variant_of(state_dict), _variant_of_model(_network(model))))
    return {name: weights[name] for name in wanted if name in weights}


def _kind_of(state_dict: Mapping[str, Tensor]) -> OfficialFormat:
    if _DETECTOR.recognises(state_dict):
        return _DETECTOR
    return _BACKBONE if "conv1x1layers.0.weight" in state_dict else _CLASSIFIER


_DROPPED = ""
"""Our name of what belongs to the file's network, but not to the model."""


def _plan(
    kind: OfficialFormat, model: nn.Module, wanted: Mapping[str, torch.Size]
) -> tuple[Callable[[str], str | None], Callable[[str], bool]]:
    """How a file's names become the model's (None if unknown), and which of the model's names the
    file must have."""

    def rename(key: str) -> str | None:
        renamed = kind.to_ours(key)
        return None if renamed is None else renamed[0]

    if isinstance(model, DFvTClassifier):
        if kind is not _CLASSIFIER:
            raise CheckpointMismatchError(
                "these are weights of a detection backbone, and the model is the classifier"
            )
        return rename, lambda name: True

    prefix = "" if isinstance(model, DFvTBackbone) else _DETECTOR_PREFIX
    if not any(name.startswith(f"{prefix}network.stem.") for name in wanted):
        raise CheckpointMismatchError(
            f"the model, a {type(model).__name__}, has no DFvT at {_DETECTOR_PREFIX[:-1]}"
        )
    heads = {"roi_heads.mask_head.deconv.weight", "backbone.fpn_lateral2.weight"}
    if kind is _DETECTOR and heads <= set(wanted):
        return rename, lambda name: True
    source = _DETECTOR_PREFIX if kind is _DETECTOR else ""

    def to_name(key: str) -> str | None:
        name = rename(key)
        if name is None:
            return None
        if not name.startswith((source + "network.", source + "outputs.")):
            return _DROPPED
        name = prefix + name[len(source) :]
        return _DROPPED if _OUTPUT.fullmatch(name) and name not in wanted else name

    def is_required(name: str) -> bool:
        if kind is _CLASSIFIER and _OUTPUT.fullmatch(name):
            return False
        return name.startswith((prefix + "network.", prefix + "outputs."))

    return to_name, is_required


def _resize_bias_table(table: Tensor, shape: torch.Size) -> Tensor:
    """((2 w - 1)^2, heads) relative biases for windows of another size w, bicubically; as they are
    where the number of heads differs, too."""
    before, after = math.isqrt(len(table)), math.isqrt(shape[0])
    if table.shape == shape or table.shape[1:] != shape[1:] or before**2 != len(table):
        return table
    grid = table.float().T.reshape(1, -1, before, before)
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic")
    return grid.flatten(2)[0].T.to(table.dtype).contiguous()


def _network(model: nn.Module) -> DFvTNetwork:
    if isinstance(model, (DFvTBackbone, DFvTClassifier)):
        return model.network
    return cast(DFvTNetwork, model.get_submodule(f"{_DETECTOR_PREFIX}network"))


def _stages(model: nn.Module) -> list[Stage]:
    return [cast(Stage, stage) for stage in _network(model).stages]


def _variant_of_model(network: DFvTNetwork) -> str:
    depths = tuple(len(cast(Stage, stage).blocks) for stage in network.stages)
    return _variant(network.channels[0], depths)


def _difference(of_weights: str, of_model: str) -> str:
    if of_weights == of_model:
        return f"the weights do not fit the model, though both are DFvT with {of_model}"
    return f"the weights are those of a DFvT with {of_weights}, the model has {of_model}"


def check_variant(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse weights under our names if they have a DFvT that is not the model's.

    Args:
        weights: of a detector, or some of them; without a DFvT among them all is well.
        model: what they are for.

    Raises:
        CheckpointMismatchError: the DFvT is of another variant, which the message names, or the
            weights are those of one without a detector around it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, DFvTNetwork):
            continue
        prefix = name + "."
        if name != "network" and _OUR_MARK in weights and prefix + _STEM not in weights:
            raise CheckpointMismatchError(
                f"these are weights of a DFvT by itself, with names such as {_OUR_MARK}; in the "
                f"model it is {name}. Take the official file, or convert that with the detector's "
                "config"
            )
        found = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
        wanted = module.state_dict()
        shapes = [
            f"{prefix}{k} is {tuple(v.shape)}, in the model {tuple(wanted[k].shape)}"
            for k, v in found.items()
            if k in wanted and v.shape != wanted[k].shape
        ]
        # Some stages alone may be given, but not some blocks of a stage.
        theirs, ours = _depths(_BLOCK, found), _depths(_BLOCK, wanted)
        if shapes or any(depth not in (0, ours[i]) for i, depth in enumerate(theirs)):
            width = found[_STEM].shape[0] * 2 if _STEM in found else "unknown"
            message = _difference(_variant(width, theirs), _variant_of_model(module))
            raise CheckpointMismatchError("; for example ".join([message, *shapes[:1]]))


def convert_to_official(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Inverse of :func:`convert_official_state_dict`, with index tables and attention masks.

    Args:
        weights: state dict of ``model``, or a part of it.
        model: a ``DFvTClassifier`` (the masks are then those of 224x224 pixels, the size of the
            released weights), a ``DFvTBackbone``, or Mask R-CNN with one.

    Raises:
        CheckpointMismatchError: a tensor that the authors' network does not have, or weights of
            another variant.
    """
    check_variant(weights, model)
    if isinstance(model, DFvTClassifier):
        official_format, prefix = _CLASSIFIER, ""
    elif isinstance(model, DFvTBackbone):
        official_format, prefix = _BACKBONE, ""
    else:
        official_format, prefix = _DETECTOR, "backbone."
    result, unknown = rename_back(weights, official_format)
    if unknown:
        raise CheckpointMismatchError(
            f"the authors' network has no place for {len(unknown)} tensors: {some_names(unknown)}"
        )
    for i, stage in enumerate(_stages(model)):
        size = stage.window_size
        for j in range(len(stage.blocks)):
            block = f"{prefix}layers.{i}.blocks.{j}."
            result[block + "attn.relative_position_index"] = relative_position_index(size)
            side = _IMAGENET_SIZE // min(32, 8 * 2**i)
            if isinstance(model, DFvTClassifier) and j % 2 and side > size:
                padded = side + -side % size
                result[block + "attn_mask"] = shift_mask(padded, padded, window_size=size)
    return result


class _DFvTFormat(WeightFormat):
    """All three kinds of files."""

    name = "DFvT"
    classes = COCO_CLASSES

    def recognises(self, names: Iterable[str]) -> bool:
        return is_official_state_dict(names)

    def describes(self, names: Iterable[str]) -> bool:
        ours = list(names)
        return any(
            kind.describes(ours) and all(kind.to_official(name) for name in ours) for kind in _KINDS
        )

    def convert(
        self,
        state_dict: Mapping[str, Tensor],
        model: nn.Module,
        *,
        allow_other_sizes: bool = False,
        require_unused: bool = False,
        description: Mapping[str, Any] | None = None,
    ) -> ConvertedWeights:
        # What is unused here is computed anew, so a file may lack it.
        weights = convert_official_state_dict(
            state_dict, model, allow_other_classes=allow_other_sizes
        )
        return ConvertedWeights(weights, {})

    def convert_back(
        self,
        weights: Mapping[str, Tensor],
        model: nn.Module,
        *,
        extras: Mapping[str, Tensor] | None = None,
        source: str = "",
    ) -> dict[str, Tensor]:
        if extras:
            raise CheckpointMismatchError(
                f"the extras {some_names(sorted(extras))} do not belong to this {self.name} model"
            )
        return convert_to_official(weights, model)

    def check(self, weights: Mapping[str, Tensor], model: nn.Module) -> None:
        # Else the backbone of another variant would be left out with a warning, as other classes
        # are.
        check_variant(weights, model)


register_official_format(_DFvTFormat())
