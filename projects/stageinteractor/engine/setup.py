"""What a config needs to know from its data sets before anything is built."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig

from ..data import check_same_classes, dataset_names, dataset_num_classes

__all__ = ["prepare_config"]

logger = logging.getLogger(__name__)


def prepare_config(
    cfg: DictConfig, overrides: Sequence[str] = (), *, training: bool = True
) -> DictConfig:
    """Register the data sets of a config, check them, and let ``model.num_classes`` follow.

    Args:
        cfg: changed in place and returned.
        overrides: the command line's; a ``model.num_classes`` among them must agree with the data.
        training: also look at the training set.

    Raises:
        ValueError: the data sets differ in their classes, or the given number of classes is not the
            data set's.
        FileNotFoundError, KeyError: a data set is missing.
    """
    names = dataset_names(cfg.dataloader.test.dataset)
    if training:
        names = [*dataset_names(cfg.dataloader.train.dataset), *names]
    num_classes = dataset_num_classes(names[0])
    if num_classes is None:
        return cfg
    classes = MetadataCatalog.get(names[0]).thing_classes
    for name in names[1:]:
        other_classes = MetadataCatalog.get(name).get("thing_classes")
        if other_classes is not None:
            check_same_classes(classes, other_classes, names[0], name)
    is_given = any(text.split("=")[0].lstrip("+") == "model.num_classes" for text in overrides)
    if "num_classes" not in cfg.model:
        return cfg
    if cfg.model.num_classes != num_classes:
        if is_given:
            raise ValueError(
                f"model.num_classes={cfg.model.num_classes}, but {names[0]} has {num_classes} "
                "classes: leave model.num_classes out, it follows the data set"
            )
        logger.info(
            "model.num_classes is set to %d, the number of classes of %s (the config has %d)",
            num_classes,
            names[0],
            cfg.model.num_classes,
        )
        cfg.model.num_classes = num_classes
    return cfg
