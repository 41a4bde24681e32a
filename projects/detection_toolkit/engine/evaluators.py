"""The evaluators of a config, any of Detectron2's or of others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..config import arguments_of_target
from ..errors import UserError

__all__ = ["build_evaluators", "check_evaluator", "coco_backend", "max_dets_per_image"]

_KEY = "dataloader.evaluator"


def build_evaluators(cfg: DictConfig, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """``dataloader.evaluator`` of a config, for one test set.

    Args:
        cfg: a node for one evaluator, or a list of them, which all see the same detections. Of
            ``dataset_name`` and ``output_dir`` each is given what it takes.
        dataset_name: in Detectron2's catalogues.
        output_dir: folder of the results.

    Raises:
        NotImplementedError: the config has none. As in Detectron2, the set is then not evaluated.
        UserError: what it describes is no evaluator, or takes no such argument.
    """
    node = OmegaConf.select(cfg, _KEY)
    if node is None:
        raise NotImplementedError(f"the config has no {_KEY}")
    given = {"dataset_name": dataset_name, "output_dir": output_dir}
    if not isinstance(node, ListConfig):
        return _build(node, given, _KEY)
    if not len(node):
        raise UserError(f"{_KEY} is an empty list: name an evaluator")
    return DatasetEvaluators([_build(child, given, f"{_KEY}[{i}]") for i, child in enumerate(node)])


def check_evaluator(evaluator: Any, source: str = _KEY) -> None:
    """
    Raises:
        UserError: it is no evaluator.
    """
    if not isinstance(evaluator, DatasetEvaluator):
        raise UserError(
            f"{source} is {type(evaluator).__name__}, not a DatasetEvaluator of Detectron2"
        )


def max_dets_per_image(cfg: DictConfig) -> int | None:
    """Detections of an image that count, as the first evaluator that has such a limit says."""
    return _first(cfg, "max_dets_per_image")


def coco_backend(cfg: DictConfig) -> str:
    """What computes COCO's metrics, as the first evaluator that has a choice says."""
    return _first(cfg, "backend") or "pycocotools"


def _first(cfg: DictConfig, argument: str) -> Any:
    node = OmegaConf.select(cfg, _KEY)
    for child in node if isinstance(node, ListConfig) else [node]:
        if isinstance(child, DictConfig) and child.get(argument) is not None:
            return child[argument]
    return None


def _build(node: Any, given: Mapping[str, str], key: str) -> DatasetEvaluator:
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(f"{key} must be an evaluator, L(COCOEvaluator)(...) or the like")
    node = copy.deepcopy(node)
    taken = arguments_of_target(node)
    for name, value in given.items():
        if name in taken:
            node[name] = value
        elif name in node and node[name] is None:  # the place that another evaluator had for it
            del node[name]
    try:
        evaluator = instantiate(node)
    except TypeError as error:
        raise UserError(f"{key} cannot be built: {error}") from error
    check_evaluator(evaluator, key)
    return evaluator
