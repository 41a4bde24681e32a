"""What a config needs to know from its data sets before anything is built."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint.class_rows import ClassNames
from ..data import dataset_names, dataset_num_classes
from ..data.formats import VAL_SHARE
from ..errors import UserError
from .recipe import follow_recipe
from .scaling import follow_epochs
from .settings import RunSettings

__all__ = ["class_number", "classes_to_keep", "prepare_config"]

logger = logging.getLogger(__name__)

# Of this project's detectors, and of Detectron2's two-stage ones, which have one class number.
_CLASS_KEYS = ("num_classes", "roi_heads.num_classes")


def prepare_config(
    cfg: DictConfig,
    overrides: Sequence[str] = (),
    *,
    training: bool = True,
    with_files: bool = True,
) -> DictConfig:
    """Register the data sets of a config, check them, and let the number of classes follow.

    That is ``model.num_classes``, or ``model.roi_heads.num_classes`` of Detectron2's two-stage
    detectors. It stays as it is where no data set has class names.

    Args:
        cfg: changed in place and returned.
        overrides: the command line's; a number of classes among them must agree with the data.
        training: also look at the training set, and let the run follow it where a ``recipe`` or
            ``train.max_epochs`` asks for it. Otherwise a recipe is followed where the training set
            is found, so that a model is evaluated as it was trained.
        with_files: the data sets' files are needed, too; see ``dataset_names``.

    Raises:
        ValueError: the data sets differ in their classes, or the given number of classes is not the
            data set's.
        FileNotFoundError, KeyError: a data set is missing.
    """
    _tell_apart(cfg)
    _skip_alike(cfg)
    _check_held_out(cfg)
    names = dataset_names(cfg.dataloader.test.dataset, with_files=with_files)
    if training:
        names = [*dataset_names(cfg.dataloader.train.dataset, with_files=with_files), *names]
        follow_recipe(cfg, overrides)
        follow_epochs(cfg, overrides)
    elif with_files:
        _follow_recipe_of_training(cfg, overrides)
    num_classes = dataset_num_classes(names)
    key = _class_key(cfg)
    if num_classes is None or key is None:
        return cfg
    current = OmegaConf.select(cfg, key)
    if current == num_classes:
        return cfg
    source = next(n for n in names if MetadataCatalog.get(n).get("thing_classes") is not None)
    if any(text.split("=")[0].lstrip("+") == key for text in overrides):
        raise UserError(
            f"{key}={current}, but {source} has {num_classes} classes: leave {key} out, it "
            "follows the data set"
        )
    logger.info(
        "%s is set to %d, the number of classes of %s (the config has %d)",
        key,
        num_classes,
        source,
        current,
    )
    OmegaConf.update(cfg, key, num_classes)
    return cfg


def _follow_recipe_of_training(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Where the training set is named, and nothing is wrong with it."""
    if cfg.get("recipe") is None:
        return
    dataset = cfg.dataloader.train.dataset
    if not any(dataset.get(key) for key in ("json_file", "path", "names")):
        return
    try:
        dataset_names(dataset)
        follow_recipe(cfg, overrides)
    except (FileNotFoundError, KeyError, UserError) as error:
        logger.warning("the recipe is not followed, as the training set cannot be used: %s", error)


def _skip_alike(cfg: DictConfig) -> None:
    """Let data sets leave out what the training loader skips, in place.

    Formats that do not say the sizes of images have them read before there is a loader.
    """
    if not OmegaConf.select(cfg, "dataloader.train.skip_unreadable"):
        return
    for part in ("train", "test"):
        node = OmegaConf.select(cfg, f"dataloader.{part}.dataset")
        if isinstance(node, DictConfig) and "skip_unreadable" in node:
            node.skip_unreadable = True


def _tell_apart(cfg: DictConfig) -> None:
    """Name training and test set by their folders, too, where their files have the same name."""
    nodes = [OmegaConf.select(cfg, f"dataloader.{part}.dataset") for part in ("train", "test")]
    if any(node is None or not node.get("json_file") or node.get("name") for node in nodes):
        return
    train, test = (Path(node.json_file).expanduser().resolve() for node in nodes)
    if train != test and train.stem == test.stem and train.parent.name != test.parent.name:
        for node, path in zip(nodes, (train, test)):
            node.name = f"{path.parent.name}_{path.stem}"


def _check_held_out(cfg: DictConfig) -> None:
    """Images that are held out of a data set must be the same for training and test.

    Raises:
        UserError: they are not.
    """
    train, test = (
        OmegaConf.select(cfg, f"dataloader.{part}.dataset") for part in ("train", "test")
    )
    if train is None or test is None or not train.get("path") or train.path != test.get("path"):
        return
    for key, default in (("val_share", VAL_SHARE), ("split_seed", 0)):
        ours, theirs = (node.get(key, default) for node in (train, test))
        if ours != theirs:
            raise UserError(
                f"dataloader.train.dataset.{key}={ours}, and dataloader.test.dataset.{key}="
                f"{theirs}: set both, or images may be trained on that are then tested"
            )


def class_number(cfg: DictConfig) -> int | None:
    """Of the model, where its config says it."""
    key = _class_key(cfg)
    return None if key is None else OmegaConf.select(cfg, key)


def classes_to_keep(cfg: DictConfig, names: Sequence[str] | None) -> ClassNames | None:
    """What a checkpointer needs to keep classes by name; None where they are not to be kept.

    Args:
        cfg: after :func:`prepare_config`.
        names: of the classes of the data; None where these are not known.
    """
    key = _class_key(cfg)
    keep = RunSettings.from_config(cfg.train).keep_known_classes
    if not keep or key is None or not names or len(names) != class_number(cfg):
        return None

    def build(num_classes: int) -> nn.Module:
        other = copy.deepcopy(cfg)
        OmegaConf.update(other, key, num_classes)
        if OmegaConf.select(other, "model.backbone.bottom_up.pretrained"):
            other.model.backbone.bottom_up.pretrained = False  # shapes need no download
        with torch.device("meta"):
            return instantiate(other.model)

    return ClassNames(list(names), build)


def _class_key(cfg: DictConfig) -> str | None:
    keys = [k for k in _CLASS_KEYS if OmegaConf.select(cfg.model, k) is not None]
    return f"model.{keys[0]}" if keys else None
