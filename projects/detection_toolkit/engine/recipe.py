"""Image size, queries and length of a run, chosen by its training set where the user has not."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import instantiate
from detectron2.structures import BoxMode
from omegaconf import DictConfig, OmegaConf

from .runs import plain_values

__all__ = ["DataSummary", "SizeRecipe", "follow_recipe", "summarize_data"]

logger = logging.getLogger(__name__)

_TRAIN = "dataloader.train.mapper.augmentations.0"
_TEST = "dataloader.test.mapper.augmentations.0"
_QUERIES = "model.initial_queries.num_queries"
_STEPS = "train.max_iter"
_PERIODS = ("train.eval_period", "train.checkpointer.period")


@dataclass(frozen=True)
class DataSummary:
    """What a recipe looks at.

    Attributes:
        num_images: of the training set.
        most_objects: of an image, without crowds.
        short_side: median of the images' shorter sides in pixels; 0 where no size is known.
        small_object: the side of a small object as a share of its image's shorter side: a tenth of
            the objects are smaller. 1 without objects.
    """

    num_images: int
    most_objects: int
    short_side: float
    small_object: float


def summarize_data(dicts: Sequence[Mapping[str, Any]]) -> DataSummary:
    """
    Args:
        dicts: Detectron2's, of a training set.
    """
    sides, shares, most = [], [], 0
    for record in dicts:
        objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
        most = max(most, len(objects))
        if not record.get("width") or not record.get("height"):
            continue
        side = min(record["width"], record["height"])
        sides.append(side)
        for annotation in objects:
            box = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS
            )
            shares.append(math.sqrt(max(box[2], 0) * max(box[3], 0)) / side)
    return DataSummary(
        num_images=len(dicts),
        most_objects=most,
        short_side=float(np.median(sides)) if sides else 0.0,
        small_object=float(np.quantile(shares, 0.1)) if shares else 1.0,
    )


class SizeRecipe:
    """A recipe for a small model on a CPU, of three numbers.

    Images are so large that a tenth of the objects is smaller than ``object_side``, and, but for
    rounding, no larger than they are. Queries are half as many again as the objects of the fullest
    image. The run sees every image ``epochs`` times, in no fewer and no more steps than its limits.
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_queries: int,
        max_iter: int,
        epochs: float = 64,
        object_side: float = 12.0,
        image_sizes: tuple[int, int] = (128, 480),
        most_queries: int = 300,
        steps: tuple[int, int] = (1000, 10000),
    ):
        """
        Args:
            image_size: shorter side of test images that the config has, in pixels; small objects
                alone make it larger.
            num_queries: that the config has, which are the fewest.
            max_iter: that the config has.
            epochs: passes over the training set.
            object_side: in pixels, of small objects.
            image_sizes, most_queries, steps: limits.
        """
        self.image_size = image_size
        self.num_queries = num_queries
        self.max_iter = max_iter
        self.epochs = epochs
        self.object_side = object_side
        self.image_sizes = tuple(image_sizes)
        self.most_queries = most_queries
        self.steps = tuple(steps)

    def choose_image_size(self, data: DataSummary) -> int:
        """In pixels, a multiple of 8."""
        needed = max(self.image_size, self.object_side / max(data.small_object, 1e-6))
        if data.short_side:
            needed = min(needed, data.short_side)
        low, high = self.image_sizes
        return 8 * round(min(max(needed, low), high) / 8)

    def choose_queries(self, data: DataSummary) -> int:
        """A multiple of 10 above the config's."""
        wanted = 10 * math.ceil(1.5 * data.most_objects / 10)
        return max(self.num_queries, min(wanted, self.most_queries))

    def choose_steps(self, data: DataSummary, batch: int) -> int:
        """A multiple of 100; ``batch`` is the images of a step."""
        low, high = self.steps
        return 100 * round(min(max(self.epochs * data.num_images / batch, low), high) / 100)

    @staticmethod
    def image_settings(size: int) -> dict[str, Any]:
        """Keys of a config for an image size."""
        shares = (5 / 6, 14 / 15, 1, 16 / 15, 7 / 6)
        return {
            f"{_TRAIN}.short_edge_length": [8 * round(size * share / 8) for share in shares],
            f"{_TRAIN}.max_size": 2 * size,
            f"{_TEST}.short_edge_length": size,
            f"{_TEST}.max_size": 2 * size,
        }

    @staticmethod
    def period(max_iter: int) -> int:
        """From one evaluation or checkpoint to the next."""
        return max(100, max_iter // 5)


def follow_recipe(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Let a config that has a ``recipe`` follow its training set, in place.

    A value that is not the recipe's own, or that the command line sets, is the user's and stays.
    The config has no recipe afterwards: that of a run says what was chosen.

    Args:
        cfg: whose training set is there.
        overrides: the command line's.
    """
    node = cfg.get("recipe")
    if node is None:
        return
    recipe = instantiate(node)
    cfg.recipe = None
    data = summarize_data(instantiate(cfg.dataloader.train.dataset))
    given = [text.split("=")[0].lstrip("+") for text in overrides]
    size = recipe.choose_image_size(data)
    default, chosen = recipe.image_settings(recipe.image_size), recipe.image_settings(size)
    said = []
    if all(_is_default(cfg, given, key, value) for key, value in default.items()):
        _set(cfg, chosen)
        said.append(f"images at {size} pixels")
    if _is_default(cfg, given, _QUERIES, recipe.num_queries):
        queries = recipe.choose_queries(data)
        _set(cfg, {_QUERIES: queries})
        said.append(f"{queries} queries")
    batch = cfg.dataloader.train.total_batch_size * cfg.train.get("accumulation_steps", 1)
    has_epochs = cfg.train.get("max_epochs") is not None and _STEPS not in given
    if not has_epochs and _is_default(cfg, given, _STEPS, recipe.max_iter):
        _set(cfg, {_STEPS: recipe.choose_steps(data, batch)})
        said.append(f"{cfg.train.max_iter} iterations")
    period = recipe.period(cfg.train.max_iter)
    for key, what in zip(_PERIODS, ("evaluation", "checkpoint")):
        if _is_default(cfg, given, key, recipe.period(recipe.max_iter)):
            _set(cfg, {key: period})
            if not has_epochs:  # they change it, and the log says what it becomes
                said.append(f"{what} every {period}")
    logger.info(
        "recipe for %d images with up to %d objects: %s. A key that you set yourself wins",
        data.num_images,
        data.most_objects,
        ", ".join(said) or "all is set",
    )


def _is_default(cfg: DictConfig, given: Sequence[str], key: str, value: Any) -> bool:
    """Whether a key is there, has the recipe's own value, and nobody has set it."""
    if any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in given):
        return False
    found = OmegaConf.select(cfg, key)
    return found is not None and plain_values(found) == value


def _set(cfg: DictConfig, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
