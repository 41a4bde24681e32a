"""Official checkpoints: weights under the authors' names -> ours, and back.

The authors' code follows mmdetection's layout (``backbone.``, ``neck.``, ``rpn_head.``,
``roi_head.bbox_head.{t}.``), ours Detectron2's. Values are never changed; the only tensors whose
elements move are those of Swin's patch merging (see :mod:`.official_names`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from .official_files import split_weights
from .official_names import FORMATS, STAGEINTERACTOR, OfficialFormat, whole_image_boxes

__all__ = [
    "CheckpointMismatchError",
    "ConvertedWeights",
    "adapt_checkpoint",
    "check_weights",
    "convert_backbone_state_dict",
    "convert_official_state_dict",
    "convert_to_official",
    "is_backbone_state_dict",
    "is_official_state_dict",
    "register_official_weights",
    "register_weights_check",
]

logger = logging.getLogger(__name__)

_OFFICIAL_NAME = re.compile(r"(module\.)?roi_head\.bbox_head\.\d+\..+")
# What depends on the number of classes or of queries alone.
_RESIZABLE = re.compile(
    r"decoder\.stages\.\d+\.class_tower\.out\..*|initial_queries\.content\.weight"
)
_BATCH_COUNT = ".num_batches_tracked"


class CheckpointMismatchError(UserError):
    """Weights and model do not fit; the message names the tensors."""


class ConvertedWeights(NamedTuple):
    """A converted official checkpoint."""

    model: dict[str, Tensor]
    """Weights under our names."""
    extras: dict[str, Tensor]
    """Tensors under their official names that the model has no place for, as they have no effect.
    They are kept so that the way back is exact."""


def is_official_state_dict(keys: Iterable[str]) -> bool:
    """Whether the names are those of an official checkpoint of a whole detector."""
    return any(_OFFICIAL_NAME.fullmatch(key) for key in keys)


def convert_official_state_dict(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    *,
    allow_other_sizes: bool = False,
    require_unused: bool = False,
) -> ConvertedWeights:
    """Official weights -> weights that ``model.load_state_dict`` takes strictly.

    Args:
        state_dict: weights under the official names.
        model: the detector that they are for; the meta device is enough, and so is a detector
            whose backbone has no parameters.
        allow_other_sizes: accept another number of classes or queries, e.g. COCO's 80 classes for
            a data set with six. Such tensors are converted all the same; the caller leaves out
            what does not fit.
        require_unused: also insist on the tensors that the official network holds without use.

    Raises:
        CheckpointMismatchError: an unknown name, a missing or a surplus tensor, or a wrong shape.
    """
    official_format = _find_format(state_dict, [f.mark for f in FORMATS])
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    for other in FORMATS:
        if other is not official_format and any(other.our_mark.fullmatch(key) for key in wanted):
            raise CheckpointMismatchError(
                f"these are official {official_format.name} weights, but the model is "
                f"{other.name}: choose a config of {official_format.name}"
            )
    weights: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    problems = _Problems()
    for key, value in state_dict.items():
        renamed = official_format.to_ours(key)
        if renamed is not None and renamed[0] in wanted:
            name, change = renamed
            weights[name] = value if change is None else change(value)
        elif official_format.is_unused(key) or (renamed and key.endswith(_BATCH_COUNT)):
            extras[key] = value
        elif renamed is not None:
            problems.surplus.append(f"{key} (would be {renamed[0]})")
        else:
            problems.surplus.append(key)
    for name, shape in wanted.items():
        official = official_format.to_official(name)
        label = f"{official[0]} (our {name})" if official else name
        if name not in weights:
            problems.missing.append(label)
        elif weights[name].shape != shape and not (
            allow_other_sizes and _RESIZABLE.fullmatch(name)
        ):
            problems.shapes.append(
                f"{label} is {tuple(weights[name].shape)}, the model has {tuple(shape)}"
            )
    if require_unused and not problems.missing:
        expected = official_format.initial_unused(weights)
        problems.missing += sorted(set(expected) - set(extras))
        problems.shapes += [
            f"{key} is {tuple(extras[key].shape)}, expected {tuple(value.shape)}"
            for key, value in expected.items()
            if key in extras and extras[key].shape != value.shape
        ]
        problems.surplus += sorted(
            key for key in extras if key not in expected and not key.endswith(_BATCH_COUNT)
        )
    problems.raise_if_any(f"official {official_format.name} weights")
    _warn_of_query_boxes(weights, extras)
    return ConvertedWeights({name: weights[name] for name in wanted}, extras)


def _warn_of_query_boxes(weights: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> None:
    for key, boxes in extras.items():
        if "init_proposal_bboxes" not in key or boxes.is_meta:
            continue
        expected = whole_image_boxes(weights)
        if boxes.shape != expected.shape or (boxes != expected).any():
            logger.warning(
                "%s is not the whole image for every query, as it is in all official weights. "
                "Queries begin with the whole image here, so detections will differ",
                key,
            )


def convert_to_official(
    weights: Mapping[str, Tensor],
    model: nn.Module,
    *,
    extras: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Our weights -> the official names: the inverse of :func:`convert_official_state_dict`.

    Args:
        weights: under our names.
        model: the detector that they belong to; the meta device is enough.
        extras: what :func:`convert_official_state_dict` set aside. A tensor that is not among
            them gets the value that the official network starts from.

    Raises:
        CheckpointMismatchError: the weights do not fit the model, or a tensor has no official
            name, as with a backbone that the authors did not use.
    """
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    problems = _Problems(
        missing=sorted(set(wanted) - set(weights)), surplus=sorted(set(weights) - set(wanted))
    )
    problems.shapes += [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(shape)}"
        for name, shape in wanted.items()
        if name in weights and weights[name].shape != shape
    ]
    problems.raise_if_any("the weights")
    official_format = _find_format(weights, [f.our_mark for f in FORMATS])
    official: dict[str, Tensor] = {}
    nameless = []
    for name in wanted:
        renamed = official_format.to_official(name)
        if renamed is None:
            nameless.append(name)
            continue
        key, change = renamed
        official[key] = weights[name] if change is None else change(weights[name])
    if nameless:
        raise CheckpointMismatchError(
            f"{_some(nameless)} have no name in official {official_format.name} checkpoints: only "
            "detectors with a backbone that the authors released can be converted back"
        )
    unused = official_format.initial_unused(weights)
    for key in list(official):
        stem = key[: -len(".running_var")]
        if key.endswith(".running_var") and stem + _BATCH_COUNT not in official:
            unused[stem + _BATCH_COUNT] = torch.tensor(0)
    foreign = sorted(
        key
        for key, value in (extras or {}).items()
        if key not in unused or unused[key].shape != value.shape
    )
    if foreign:
        raise CheckpointMismatchError(
            f"the extras {_some(foreign)} do not belong to this {official_format.name} model"
        )
    official.update(unused)
    official.update(extras or {})
    return official


# Tensors of a detector's backbone that ImageNet models lack: offsets of deformable convolutions,
# norms of Swin's outputs, counters.
_ONLY_IN_DETECTOR = re.compile(r".*(\.offset\.(weight|bias)|\.norm\d\.\w+|num_batches_tracked)")
# Classifiers of ImageNet models, and buffers that Swin models recompute.
_NOT_IN_BACKBONE = re.compile(r"(fc|head|norm)\.(weight|bias)|.*\.attn_mask|head\..*")


def is_backbone_state_dict(keys: Iterable[str]) -> bool:
    """Whether the names are those of an ImageNet ResNet (torchvision, timm) or an original Swin."""
    names = set(keys)
    return _is_resnet(names) or _is_swin(names)


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
        state_dict: of torchvision's or timm's ResNet or ResNeXt, or of the original Swin.
        model: the detector.

    Raises:
        CheckpointMismatchError: the network is of another kind or depth than the model's backbone.
    """
    prefix = "backbone.bottom_up."
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(prefix)}
    weights: dict[str, Tensor] = {}
    problems = _Problems()
    is_resnet = _is_resnet(set(state_dict))
    for key, value in state_dict.items():
        if _NOT_IN_BACKBONE.fullmatch(key):
            continue
        if is_resnet:
            renamed = STAGEINTERACTOR.to_ours(f"backbone.{key}")
            name = renamed[0] if renamed else None
        else:
            name = prefix + key
        if name in wanted:
            weights[name] = value
        elif not key.endswith(_BATCH_COUNT):
            problems.surplus.append(key)
    for name, shape in wanted.items():
        if name in weights:
            if weights[name].shape != shape:
                problems.shapes.append(
                    f"{name} is {tuple(weights[name].shape)}, the model has {tuple(shape)}"
                )
        elif not _ONLY_IN_DETECTOR.fullmatch(name):
            problems.missing.append(name)
    problems.raise_if_any("the ImageNet weights")
    return weights


_CHECKS: list[Callable[[Mapping[str, Tensor], nn.Module], None]] = []
_REGISTERED: list[
    tuple[
        Callable[[Iterable[str]], bool],
        Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]],
    ]
] = []


def register_official_weights(
    recognises: Callable[[Iterable[str]], bool],
    convert: Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]],
) -> None:
    """Let :func:`adapt_checkpoint` take the official weights of a further project.

    Args:
        recognises: whether names of tensors are such weights'. Earlier ones are asked first.
        convert: weights and the detector to be initialised -> weights under its names; raises
            :class:`CheckpointMismatchError`.
    """
    _REGISTERED.append((recognises, convert))


def register_weights_check(check: Callable[[Mapping[str, Tensor], nn.Module], None]) -> None:
    """Let :func:`check_weights` ask a further project.

    Args:
        check: given weights under this implementation's names and the detector to be initialised;
            raises :class:`CheckpointMismatchError` if they are those of another network, so that
            leaving out what does not fit is not what is wanted.
    """
    _CHECKS.append(check)


def check_weights(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """What is registered to be checked before weights initialise a detector.

    Raises:
        CheckpointMismatchError: they are those of another network.
    """
    for check in _CHECKS:
        check(weights, model)


def adapt_checkpoint(
    checkpoint: dict[str, Any], model: nn.Module, path: str | Path
) -> dict[str, Any]:
    """Let Detectron2's checkpointer take a file of the authors' code or of an ImageNet model.

    Args:
        checkpoint: as :func:`~.official_files.read_checkpoint` returns it.
        model: the detector to be initialised. Its number of classes and queries may differ.
        path: of the file, for messages.

    Returns:
        {"model": converted weights}, or the checkpoint itself if it is of neither kind.

    Raises:
        CheckpointMismatchError: it is of such a kind, but of another network.
    """
    weights = next(
        (checkpoint[k] for k in ("state_dict", "model") if isinstance(checkpoint.get(k), Mapping)),
        checkpoint,
    )
    for recognises, convert in _REGISTERED:
        if recognises(weights):
            weights, _ = split_weights(checkpoint, path)
            return {"model": convert(weights, model)}
    if is_official_state_dict(weights):
        weights, _ = split_weights(checkpoint, path)
        converted = convert_official_state_dict(weights, model, allow_other_sizes=True)
        return {"model": converted.model}
    if is_backbone_state_dict(weights):
        weights, _ = split_weights(checkpoint, path)
        return {"model": convert_backbone_state_dict(weights, model)}
    return checkpoint


def _find_format(names: Iterable[str], marks: list[re.Pattern[str]]) -> OfficialFormat:
    keys = list(names)
    if all(key.startswith(("backbone.", "neck.")) for key in keys):
        return STAGEINTERACTOR  # backbone and neck alone: named alike by all
    for official_format, mark in zip(FORMATS, marks):
        if any(mark.fullmatch(key) for key in keys):
            return official_format
    known = " or ".join(f.name for f in FORMATS)
    raise CheckpointMismatchError(
        f"these are no weights of {known}: among {len(keys)} tensors are {_some(keys, 4)}"
    )


class _Problems:
    """Collects what does not fit, so that one error tells it all."""

    def __init__(self, missing: list[str] | None = None, surplus: list[str] | None = None):
        self.missing = missing or []
        self.surplus = surplus or []
        self.shapes: list[str] = []

    def raise_if_any(self, what: str) -> None:
        found = [
            f"{len(names)} {kind}: {_some(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("surplus", self.surplus),
                ("of the wrong shape", self.shapes),
            )
            if names
        ]
        if found:
            raise CheckpointMismatchError(
                f"{what} do not fit the model:\n  "
                + "\n  ".join(found)
                + "\nIs this the config of the model that the checkpoint was trained with?"
            )


def _some(names: list[str], count: int = 10) -> str:
    more = f", ... and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
