"""The folder of a run: what using its detector takes, and who may begin a run in it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config.lazy import _convert_target_to_string
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from ..checkpoint.checkpointer import BEST_CHECKPOINT, last_checkpoint
from ..checkpoint.hub import HUB, RUN_CONFIG, WEIGHTS_FILE, local_model, weights_in
from ..data import dataset_names
from ..errors import UserError
from ..texts import shown
from .folder_lock import check_unlocked

__all__ = [
    "CONFIG_NAME",
    "EVALUATION_CONFIG_NAME",
    "changes_of_recipe",
    "claim_folder",
    "describe_run",
    "find_run",
    "holds_run",
    "is_published",
    "log_config_of_run",
    "plain_values",
    "usable_device",
]

logger = logging.getLogger(__name__)

CONFIG_NAME = RUN_CONFIG
EVALUATION_CONFIG_NAME = "evaluation.yaml"
# Those that a resumed run has from its checkpoint, with the optimiser's state.
_OF_CHECKPOINT = ("optimizer.lr", "optimizer.weight_decay")
_OF_CONFIG = (
    "dataloader.train.total_batch_size",
    "train.accumulation_steps",
    "train.max_iter",
    "train.mix_until",
    "lr_multiplier",
)


def find_run(path: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Config and weights of a run.

    Args:
        path: its folder (``train.output_dir``), the ``config.yaml`` there, or a checkpoint
            beside one. The same of a folder that was written to be published, or
            ``hf://OWNER/NAME`` of one on the Hugging Face hub.

    Returns:
        the config file, and the checkpoint: the named one, or the best, the last, or what is
        published; None where the folder has none yet. None if the path is not of a run, but a
        config of another kind.

    Raises:
        FileNotFoundError: a folder or checkpoint without a ``config.yaml``.
        CheckpointFileError: the hub has no such model, or cannot be reached.
    """
    if os.fspath(path).startswith(HUB):
        return local_model(os.fspath(path))
    given = Path(path).expanduser()
    if given.is_dir():
        folder, weights = given, _use_of(given)
    elif given.suffix in (".pth", ".safetensors"):
        folder, weights = given.parent, str(given)
        if not given.is_file():
            raise FileNotFoundError(f"checkpoint {given} does not exist")
    elif given.name == CONFIG_NAME and given.is_file():
        folder, weights = given.parent, _use_of(given.parent)
    else:
        return None
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise FileNotFoundError(
            f"there is no {CONFIG_NAME} in {folder}: name a run's folder, or the config with "
            "--config-file and the checkpoint as train.init_checkpoint"
        )
    return str(config), weights


def log_config_of_run(path: str, config: str) -> None:
    """Name the config that goes with weights or a folder, where it has not been named itself."""
    if os.path.abspath(os.path.expanduser(path)) != os.path.abspath(config):
        logger.info("config of %s: %s", shown(path), shown(config))


def _use_of(folder: Path) -> str | None:
    best = folder / f"{BEST_CHECKPOINT}.pth"
    if best.is_file():
        return str(best)
    last, problem = last_checkpoint(folder)
    if last is None and problem and (folder / "last_checkpoint").exists():
        logger.warning("%s: it is not used", problem)
    return weights_in(folder) if last is None else str(last)


def is_published(weights: str | None) -> bool:
    """Whether weights that :func:`find_run` has found are those of a published folder, in which
    no results belong."""
    return weights is not None and Path(weights).name == WEIGHTS_FILE


def holds_run(folder: Path) -> bool:
    """Whether a run has left a checkpoint there."""
    return (folder / "last_checkpoint").exists() or any(folder.glob("model_*.pth"))


def claim_folder(folder: str, *, move_aside: bool = False) -> None:
    """Make sure that a new run does not mix with an earlier one, whose checkpoints are there.

    Args:
        folder: ``train.output_dir``.
        move_aside: rename the folder of the earlier run.

    Raises:
        UserError: there is an earlier run, and it is not to be moved, or it is not over.
    """
    path = Path(folder)
    if "://" in folder or not path.is_dir():
        return
    check_unlocked(path)
    if not holds_run(path):
        return
    if not move_aside:
        raise UserError(
            f"{folder} holds a run already: go on with it by --resume, choose another "
            "train.output_dir, or rename the folder by --move-aside"
        )
    number = 1
    while (aside := path.with_name(f"{path.resolve().name}.{number}")).exists():
        number += 1
    path.rename(aside)
    print(f"the earlier run in {folder} is now in {aside}", flush=True)


def describe_run(cfg: DictConfig) -> dict[str, Any]:
    """What a checkpoint tells about its run, in plain values.

    Returns:
        "classes": their names, or None; "input_format" and "resizing" of test images, as the
        mapper's config has them; "recipe": what :func:`changes_of_recipe` compares.
    """
    classes = None
    for name in dataset_names(cfg.dataloader.test.dataset):
        classes = classes or MetadataCatalog.get(name).get("thing_classes")
    keys = {"input_format": "image_format", "resizing": "augmentations"}
    mapper = OmegaConf.select(cfg, "dataloader.test.mapper")
    facts = {
        key: None if mapper is None else plain_values(mapper.get(k)) for key, k in keys.items()
    }
    recipe = {
        key: plain_values(OmegaConf.select(cfg, key)) for key in (*_OF_CHECKPOINT, *_OF_CONFIG)
    }
    return {"classes": None if classes is None else list(classes), **facts, "recipe": recipe}


def plain_values(value: Any) -> Any:
    """A node of a config as values that a file may hold; callables as their names."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    # What JSON does not know are the callables of a LazyConfig.
    return json.loads(json.dumps(value, default=_convert_target_to_string))


def changes_of_recipe(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumed run's config changes, and which of the two values holds: a line for each.

    Args:
        before, now: the "recipe" of :func:`describe_run`, of the checkpoint and of the config.
    """
    lines = []
    for key in (*_OF_CHECKPOINT, *_OF_CONFIG):
        if key not in before or before[key] == now.get(key):
            continue
        old, new = before[key], now.get(key)
        if isinstance(old, dict) or isinstance(new, dict):
            lines.append(f"{key} is another one than before: that of the config holds from here on")
        elif key in _OF_CHECKPOINT:
            lines.append(
                f"{key}={new} of the config is not used: {old} of the checkpoint holds. For "
                "another one begin a new run, with the checkpoint as train.init_checkpoint"
            )
        else:
            lines.append(f"{key}={new} of the config holds from here on, it was {old} before")
    return lines


def usable_device(cfg: DictConfig) -> None:
    """Let the config of a run on a GPU be used on a machine without one, in place."""
    if torch.device(cfg.train.device).type == "cuda" and not torch.cuda.is_available():
        logger.warning("there is no GPU here: train.device=cpu in place of %s", cfg.train.device)
        cfg.train.device = "cpu"
