"""Evaluating a detector on the test sets of a config, and writing down what came out."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..data import dataset_names
from ..durable import make_folder, remove_links, write_text
from ..errors import UserError
from ..evaluation import (
    VALIDATION,
    build_loss_evaluator,
    configured_label_assigners,
    evaluate_stages,
    run_evaluator,
)
from ..evaluation.stage_predictions import STAGE_PREDICTIONS
from ..texts import FILE_ONLY, parse_json
from .evaluators import check_evaluator, coco_backend, max_dets_per_image
from .interruption import Interruption
from .precision import autocast_dtype
from .settings import RunSettings

__all__ = [
    "EvaluationFacts",
    "InterruptedEvaluation",
    "better_weights",
    "evaluate_test_sets",
    "inference_folder",
    "metric_name",
    "prefer_results_of",
]

logger = logging.getLogger(__name__)

# What an evaluation leaves in its folder.
_RESULTS = (
    "metrics.json",
    "stage_metrics.json",
    STAGE_PREDICTIONS,
    "coco_instances_results.json",
    "instances_predictions.pth",
)

# Tasks whose metrics Detectron2's evaluator shows as tables.
_WITH_TABLES = ("bbox", "segm")

_facts_of_run: ContextVar[EvaluationFacts | None] = ContextVar("_facts_of_run", default=None)


class InterruptedEvaluation(Exception):
    """A signal has come within an evaluation."""


@dataclass(frozen=True)
class EvaluationFacts:
    """What an evaluation must know, and no config can tell.

    Attributes:
        averaged: the model has averaged (EMA) weights; the results are labelled so.
        by_stage: also evaluate every stage.
        interruption: of the run that the evaluation is a part of; ends it, too.
        source: where the weights are from, for people: a checkpoint, or the iteration of a run.
    """

    averaged: bool
    by_stage: bool
    interruption: Interruption | None = None
    source: str | None = None

    @classmethod
    def current(cls, cfg: DictConfig) -> EvaluationFacts:
        """Those of the run that evaluates; without one, what the config asks for."""
        facts = _facts_of_run.get()
        if facts is not None:
            return facts
        settings = RunSettings.from_config(cfg.train)
        return cls(averaged=settings.ema.enabled, by_stage=settings.stage_evaluation)

    @contextlib.contextmanager
    def of_run(self) -> Iterator[None]:
        """While this lasts, these are the current ones.

        As Detectron2's ``EventStorage`` does, this reaches what is called through a method whose
        signature is Detectron2's: a trainer's ``test``, which other projects override.
        """
        token = _facts_of_run.set(self)
        try:
            yield
        finally:
            _facts_of_run.reset(token)


def evaluate_test_sets(
    cfg: DictConfig,
    model: nn.Module,
    evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    *,
    facts: EvaluationFacts,
    build_loader: Callable[[DictConfig, str], Iterable[Any]],
    build_evaluator: Callable[[DictConfig, str], DatasetEvaluator],
) -> dict[str, Any]:
    """What ``Trainer.test`` does; see there.

    Args:
        cfg: names the test sets, and the folder that the results go to.
        model: what is evaluated.
        evaluators: one for each test set; None: they are built.
        facts: about this evaluation.
        build_loader, build_evaluator: (config, name of a data set) -> its loader, its evaluator.

    Returns:
        the results; by data set where there are several.

    Raises:
        InterruptedEvaluation: the run is to end.
        UserError, LoaderProcessError: see ``Trainer.test``.
        NonFinitePredictionError: no prediction for an image is finite; in all processes.
    """
    settings = RunSettings.from_config(cfg.train)
    names = dataset_names(cfg.dataloader.test.dataset)
    if isinstance(evaluators, DatasetEvaluator):
        evaluators = [evaluators]
    if evaluators is not None and len(evaluators) != len(names):
        raise UserError(f"{len(evaluators)} evaluators for {len(names)} test sets")
    weights = "averaged" if facts.averaged else "plain"
    results: dict[str, Any] = OrderedDict()
    for i, name in enumerate(names):
        folder = inference_folder(cfg, name)
        if comm.is_main_process():
            make_folder(folder.parent)
            remove_links(*_result_files(make_folder(folder)))  # Detectron2's writers follow them
            _keep_results_of_other_weights(folder, weights)
        loader = build_loader(cfg, name)
        # A loader of another project has its own errors.
        explained = getattr(loader, "process_errors", contextlib.nullcontext)
        if facts.interruption is not None:
            loader = _InterruptibleLoader(loader, facts.interruption)
        try:
            evaluator = evaluators[i] if evaluators else build_evaluator(cfg, name)
        except NotImplementedError as error:  # as in Detectron2
            logger.warning("%s is not evaluated: %s", name, error)
            results[name] = {}
            continue
        check_evaluator(evaluator, "what build_evaluator returns")
        losses = build_loss_evaluator(model, name) if settings.validation_loss else None
        listening = contextlib.nullcontext() if losses is None else losses.listening()
        if losses is not None:
            evaluator = DatasetEvaluators([evaluator, losses])
        with _autocast(settings), explained(), listening:
            if facts.by_stage:
                results[name] = _evaluate_stages(
                    cfg, model, loader, evaluator, name, folder=folder, weights=weights
                )
            else:
                _forget_stages(folder)
                results[name] = run_evaluator(model, loader, evaluator)
        if comm.is_main_process():
            for path in _result_files(folder):  # of an evaluation before
                _kept_as(path, weights).unlink(missing_ok=True)
            about = {
                "weights": weights,
                "checkpoint": facts.source,
                "max_dets_per_image": max_dets_per_image(cfg),
            }
            _report(name, results[name], folder=folder, about=about)
    return next(iter(results.values())) if len(results) == 1 else results


def inference_folder(cfg: DictConfig, dataset_name: str) -> Path:
    """Where the results of a test set are."""
    return Path(RunSettings.from_config(cfg.train).output_dir, "inference", dataset_name)


def metric_name(cfg: DictConfig, metric: str) -> str:
    """With several test sets metrics begin with the set's name; the first one's is meant."""
    names = dataset_names(cfg.dataloader.test.dataset)
    if len(names) == 1 or any(metric.startswith(f"{name}/") for name in names):
        return metric
    return f"{names[0]}/{metric}"


class _InterruptibleLoader:
    """A test loader that ends an evaluation when the run is asked to end.

    For one process only: several would have to agree before every batch.
    """

    def __init__(self, loader: Iterable[Any], interruption: Interruption):
        self._loader = loader
        self._interruption = interruption

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if self._interruption.signal_name is not None and comm.get_world_size() == 1:
                raise InterruptedEvaluation
            yield batch


def _autocast(settings: RunSettings) -> torch.autocast | contextlib.nullcontext:
    if not settings.amp.evaluation:
        return contextlib.nullcontext()
    dtype = autocast_dtype(settings.amp.precision, settings.device)
    return torch.autocast(torch.device(settings.device).type, dtype=dtype)


def _evaluate_stages(
    cfg: DictConfig,
    model: nn.Module,
    loader: Iterable[Any],
    evaluator: DatasetEvaluator,
    name: str,
    *,
    folder: Path,
    weights: str,
) -> dict[str, Any]:
    """Evaluate as always, and leave the metrics of every stage in ``stage_metrics.json``."""
    results, _ = evaluate_stages(
        model,
        loader,
        evaluator,
        dataset_name=name,
        label_assigners=configured_label_assigners(cfg),
        max_dets_per_image=max_dets_per_image(cfg),
        backend=coco_backend(cfg),
        output_file=folder / "stage_metrics.json",
        facts={"weights": weights},
    )
    return results


def _forget_stages(folder: Path) -> None:
    """Metrics by stage of an earlier evaluation do not go with the detections of this one."""
    if comm.is_main_process():
        for file_name in ("stage_metrics.json", STAGE_PREDICTIONS):
            (folder / file_name).unlink(missing_ok=True)


def _report(name: str, results: dict[str, Any], *, folder: Path, about: Mapping[str, Any]) -> None:
    """Print the results of one test set and write them to a file."""
    of_evaluator = {task: metrics for task, metrics in results.items() if task != VALIDATION}
    if VALIDATION in results:
        logger.info(
            "validation loss of %s (%s weights): %s",
            name,
            about["weights"],
            ", ".join(f"{k} {v:.4g}" for k, v in results[VALIDATION].items() if "/" not in k),
        )
    if not of_evaluator:
        logger.info(
            "%s has no annotations, or nothing was detected: the detections are in %s",
            name,
            folder / "coco_instances_results.json",
        )
        return
    line = "Evaluation results for %s (%s weights) in csv format:"
    logger.info(line, name, about["weights"], extra=FILE_ONLY)
    print_csv_format(of_evaluator)  # for log.txt; the console has the tables of COCO's tasks
    others = {task: of_task for task, of_task in of_evaluator.items() if task not in _WITH_TABLES}
    if others:
        values = flatten_results_dict(others).items()
        words = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values)
        logger.info("results for %s (%s weights): %s", name, about["weights"], words)
    path = folder / "metrics.json"
    document = {
        "dataset": name,
        "classes": MetadataCatalog.get(name).get("thing_classes"),
        **about,
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "results": {
            # A metric without any object, as APs without small ones, is NaN, which JSON lacks.
            task: {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            for task, metrics in results.items()
        },
    }
    write_text(path, json.dumps(document, indent=2))


def better_weights(results: Mapping[str, Mapping[str, Any]], metric: str, *, mode: str) -> str:
    """Which weights have the better value of a metric, of several evaluated ones.

    Args:
        results: name of the weights -> their results, as ``Trainer.test`` returns them.
        metric: as Detectron2 names it.
        mode: "max" or "min".

    Returns:
        the name; the last one's where the values are equal, or none is a number.
    """
    values = {name: flatten_results_dict(r).get(metric, math.nan) for name, r in results.items()}
    shown = ", ".join(f"{value:.5g} with the {name} weights" for name, value in values.items())
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    better = next(reversed(finite or values))
    for name, value in finite.items():
        if value > finite[better] if mode == "max" else value < finite[better]:
            better = name
    logger.info("%s is %s: the %s ones count", metric, shown, better)
    return better


def prefer_results_of(cfg: DictConfig, weights: str) -> None:
    """Let the results of these weights have the files' plain names, of two that were evaluated."""
    for name in dataset_names(cfg.dataloader.test.dataset):
        folder = inference_folder(cfg, name)
        if _weights_of_results(folder) in (None, weights):
            continue
        _keep_results_of_other_weights(folder, weights)
        for path in _result_files(folder):
            if _kept_as(path, weights).is_file():
                _kept_as(path, weights).replace(path)


def _result_files(folder: Path) -> list[Path]:
    return [folder / name for name in _RESULTS]


def _kept_as(path: Path, weights: str) -> Path:
    return path.with_name(f"{path.stem}_{weights}{path.suffix}")


def _weights_of_results(folder: Path) -> str | None:
    try:
        document = parse_json((folder / "metrics.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    weights = document.get("weights") if isinstance(document, dict) else None
    return weights if weights in ("plain", "averaged") else None


def _keep_results_of_other_weights(folder: Path, weights: str) -> None:
    """Averaged weights do not overwrite the results of plain ones, nor the reverse."""
    other = _weights_of_results(folder)
    if other in (None, weights):
        return
    for path in _result_files(folder):
        if path.is_file():
            path.replace(_kept_as(path, other))
        else:  # of an evaluation before
            _kept_as(path, other).unlink(missing_ok=True)
    logger.info("the results of the %s weights are kept in %s/*_%s.*", other, folder, other)
