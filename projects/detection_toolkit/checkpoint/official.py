"""Official checkpoints: weights under the authors' names -> ours, and back.

Which names these are, each project says itself (:mod:`.official_format`). The authors' code follows
mmdetection's layout (``backbone.``, ``neck.``, ``rpn_head.``, ``roi_head.``), ours Detectron2's.
Values are never changed; the only tensors whose elements move are those of Swin's patch merging
(see :mod:`.name_rules`), and those that a project's format resizes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnknownNameError
from .name_rules import Renamer, resnet_rules
from .official_files import DESCRIPTION, CheckpointFileError, no_weights
from .official_format import (
    ASK_CONFIG,
    BATCH_COUNT,
    CheckpointMismatchError,
    ConvertedWeights,
    Mismatch,
    WeightFormat,
    format_of_official,
    format_of_ours,
    official_formats,
    some_names,
)
from .weights import find_weights

__all__ = [
    "CheckpointMismatchError",
    "ConvertedWeights",
    "adapt_checkpoint",
    "check_weights",
    "class_names",
    "convert_backbone_state_dict",
    "convert_official_state_dict",
    "convert_to_official",
    "is_backbone_state_dict",
    "is_official_state_dict",
    "official_file",
]

logger = logging.getLogger(__name__)

_MOST_REPEATED = 2**26  # bytes
_CATEGORY_IDS = 91  # of COCO, of which 80 are classes

# A cascade of heads in mmdetection's layout, of whichever detector.
_CASCADE = re.compile(r"(module\.)?roi_head\.bbox_head\.\d+\..+")


def is_official_state_dict(keys: Iterable[str]) -> bool:
    """Whether the names are those of an official checkpoint, of any project or of another cascade
    in mmdetection's layout."""
    names = list(keys)
    return any(_CASCADE.fullmatch(name) for name in names) or any(
        f.recognises(names) for f in official_formats()
    )


def convert_official_state_dict(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    *,
    allow_other_sizes: bool = False,
    require_unused: bool = False,
    description: Mapping[str, Any] | None = None,
) -> ConvertedWeights:
    """Official weights -> weights for a model; those of a whole detector load strictly.

    Args:
        state_dict: weights under the official names.
        model: the detector that they are for; the meta device is enough, and so is a detector
            whose backbone has no parameters.
        allow_other_sizes: accept another number of classes or queries, e.g. COCO's 80 classes for
            a data set with six. Such tensors are converted all the same; the caller leaves out
            what does not fit.
        require_unused: also insist on the tensors that the official network holds without use.
        description: what a file beside the weights tells of their network, as Hugging Face's
            ``config.json`` does.

    Raises:
        CheckpointMismatchError: an unknown name, a missing or a surplus tensor, or a wrong shape.
    """
    return format_of_official(state_dict).convert(
        state_dict,
        model,
        allow_other_sizes=allow_other_sizes,
        require_unused=require_unused,
        description=description,
    )


def convert_to_official(
    weights: Mapping[str, Tensor],
    model: nn.Module,
    *,
    extras: Mapping[str, Tensor] | None = None,
    source: str = "",
) -> dict[str, Tensor]:
    """Our weights -> the official names: the inverse of :func:`convert_official_state_dict`.

    Args:
        weights: under our names.
        model: the detector that they belong to; the meta device is enough.
        extras: what :func:`convert_official_state_dict` set aside. A tensor that is not among
            them gets the value that the official network starts from.
        source: whose names these are, where several publish the model's weights; empty: the first
            of :attr:`WeightFormat.sources`.

    Raises:
        CheckpointMismatchError: the weights do not fit the model, or a tensor has no official
            name, as with a backbone that the authors did not use.
        UnknownNameError: no such source.
    """
    weight_format = _with_source(weights, model, source)
    return weight_format.convert_back(weights, model, extras=extras, source=source)


def official_file(
    weights: Mapping[str, Tensor],
    model: nn.Module,
    *,
    extras: Mapping[str, Tensor] | None = None,
    source: str = "",
) -> dict[str, Any]:
    """What an official file of our weights holds; see :func:`convert_to_official`."""
    weight_format = _with_source(weights, model, source)
    official = weight_format.convert_back(weights, model, extras=extras, source=source)
    return weight_format.contain(official, source=source)


def _with_source(weights: Iterable[str], model: nn.Module, source: str) -> WeightFormat:
    weight_format = format_of_ours(weights, model.state_dict())
    if source and source not in weight_format.sources:
        known = ", ".join(weight_format.sources) or "one, which needs no name"
        raise UnknownNameError(
            f"no source {source!r} of {weight_format.name} weights: there is {known}"
        )
    return weight_format


# Tensors of a detector's backbone that ImageNet models lack: offsets of deformable convolutions,
# norms of Swin's outputs, counters.
_ONLY_IN_DETECTOR = re.compile(r".*(\.offset\.(weight|bias)|\.norm\d\.\w+|num_batches_tracked)")
# Classifiers of ImageNet models, and buffers that Swin models recompute.
_NOT_IN_BACKBONE = re.compile(r"(fc|head|norm)\.(weight|bias)|.*\.attn_mask|head\..*")
_RESNET = Renamer((r.official, r.ours, r.to_ours) for r in resnet_rules())


# Before all names, where a backbone was taken out of a detector.
_OF_DETECTOR = "backbone."


def is_backbone_state_dict(keys: Iterable[str]) -> bool:
    """Whether the names are those of an ImageNet ResNet (torchvision, timm) or an original Swin,
    with ``backbone.`` before all of them or not."""
    names = set(_without_detector(dict.fromkeys(keys)))
    return _is_resnet(names) or _is_swin(names)


def _without_detector(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    if not all(name.startswith(_OF_DETECTOR) for name in weights):
        return weights
    return {name[len(_OF_DETECTOR) :]: value for name, value in weights.items()}


def _is_resnet(names: set[str]) -> bool:
    return {"conv1.weight", "layer1.0.conv1.weight"} <= names


def _is_swin(names: set[str]) -> bool:
    return {"patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"} <= names


def convert_backbone_state_dict(
    state_dict: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Weights of a plain ImageNet model -> names of the detector's backbone.

    The classifier is dropped. Tensors that only the detector has (the offsets of deformable
    convolutions, the norms of Swin's outputs) are not among the result and keep their
    initialisation.

    Args:
        state_dict: of torchvision's or timm's ResNet or ResNeXt, or of the original Swin; all
            names may begin with ``backbone.``.
        model: the detector.

    Raises:
        CheckpointMismatchError: the network is of another kind or depth than the model's backbone.
    """
    prefix = "backbone.bottom_up."
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(prefix)}
    weights: dict[str, Tensor] = {}
    problems = Mismatch()
    state_dict = _without_detector(state_dict)
    is_resnet = _is_resnet(set(state_dict))
    for key, value in state_dict.items():
        if _NOT_IN_BACKBONE.fullmatch(key):
            continue
        if is_resnet:
            renamed = _RESNET(f"backbone.{key}")
            name = renamed[0] if renamed else None
        else:
            name = prefix + key
        if name in wanted:
            weights[name] = value
        elif not key.endswith(BATCH_COUNT):
            problems.surplus.append(key)
    for name, shape in wanted.items():
        if name in weights:
            if weights[name].shape != shape:
                problems.shapes.append(
                    f"{name} is {tuple(weights[name].shape)}, the model has {tuple(shape)}"
                )
        elif not _ONLY_IN_DETECTOR.fullmatch(name):
            problems.missing.append(name)
    problems.raise_if_any("the ImageNet weights do not fit the model", ASK_CONFIG)
    return weights


def check_weights(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """What the projects want to be checked before weights under our names initialise a detector.

    Raises:
        CheckpointMismatchError: they are those of another network.
    """
    for weight_format in official_formats():
        weight_format.check(weights, model)


def _check_tensors(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Whether tensors are what a model can hold; a warning names those with NaN.

    Args:
        weights: of a file.
        path: of it, for messages.

    Raises:
        CheckpointFileError: they are not; names them.
    """
    odd = [f"{name} ({reason})" for name, x in weights.items() if (reason := _oddity(x))]
    if odd:
        raise CheckpointFileError(f"{path} has tensors that no model holds: {some_names(odd, 3)}")
    broken = [
        name
        for name, x in weights.items()
        if (x.is_floating_point() or x.is_complex()) and not torch.isfinite(x).all()
    ]
    if broken:
        logger.warning(
            "%s has weights that are NaN or infinite, in %d of %d tensors: %s",
            path,
            len(broken),
            len(weights),
            some_names(broken, 3),
        )


def _oddity(x: Tensor) -> str:
    """Why no model holds a tensor; empty for a usual one."""
    if x.is_meta:
        return "without values"
    if x.layout is not torch.strided or x.is_quantized or x.is_nested:
        return "sparse, nested or quantised"
    if x.is_floating_point() and x.element_size() == 1:
        return f"of {x.dtype}"
    size = x.numel() * x.element_size()
    # A view may repeat a number without end: a small file would take all memory.
    if size > _MOST_REPEATED and size > x.untyped_storage().nbytes():
        return "more values than the file holds"
    return ""


def class_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Classes that a file of MMDetection names, or a ``config.json`` beside the weights.

    Those of category ids with gaps, as COCO's 91, are none: their rows are taken out.
    """
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    of_data = meta.get("dataset_meta")
    for node, key in ((meta, "CLASSES"), (of_data, "classes"), (of_data, "CLASSES")):
        found = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(found, (list, tuple)) and all(isinstance(name, str) for name in found):
            return list(found) or None
    labels = (checkpoint.get(DESCRIPTION) or {}).get("id2label")
    if not isinstance(labels, Mapping) or len(labels) == _CATEGORY_IDS:
        return None
    found = [labels.get(str(i)) for i in range(len(labels))]
    return found if found and all(isinstance(name, str) for name in found) else None


def adapt_checkpoint(
    checkpoint: dict[str, Any], model: nn.Module, path: str | Path
) -> dict[str, Any]:
    """Let Detectron2's checkpointer take a file of another program.

    That is one whose weights are wrapped in another way (:mod:`.weights`), a file of the authors'
    code, or one of an ImageNet model.

    Args:
        checkpoint: as :func:`~.official_files.read_checkpoint` returns it.
        model: the detector to be initialised. Its number of classes and queries may differ.
        path: of the file, for messages.

    Returns:
        the weights under our names as "model", and of our own files the rest; of official ones
        "run", which holds the "classes" that they name, or that the format knows. Averaged weights,
        wherever they were, are in "ema"; where there are no others, they are "model" as well.

    Raises:
        CheckpointFileError: there are no weights.
        CheckpointMismatchError: they are official ones or of ImageNet, but of another network.
    """
    wanted = model.state_dict()
    found = find_weights(checkpoint, wanted)
    weights = found.any
    if not weights:
        raise no_weights(checkpoint, path)
    for part in (found.plain, found.averaged):
        _check_tensors(part or {}, path)
    for key in ("model", "ema"):
        value = checkpoint.get(key)
        if value is not None and not isinstance(value, (Mapping, Tensor)):
            kind = type(value).__name__
            raise CheckpointFileError(f"{path} has no weights under {key!r}, but a {kind}")
    if is_official_state_dict(weights):
        converted = convert_official_state_dict(
            weights, model, allow_other_sizes=True, description=checkpoint.get(DESCRIPTION)
        )
        classes = class_names(checkpoint) or list(format_of_official(weights).classes)
        return {"model": converted.model, **({"run": {"classes": classes}} if classes else {})}
    if is_backbone_state_dict(weights):
        return {"model": convert_backbone_state_dict(weights, model)}
    rest = {k: v for k, v in checkpoint.items() if not isinstance(v, Tensor)}
    if not isinstance(rest.get("run"), Mapping):  # another program's
        rest.pop("run", None)
    if found.averaged is not None and (found.plain is None or "ema" not in rest):
        rest["ema"] = found.averaged
    return {**rest, "model": weights}
