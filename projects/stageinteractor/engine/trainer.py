"""Detectron2's ``DefaultTrainer``, fed by a LazyConfig."""

from __future__ import annotations

import copy
import json
import logging
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.engine.defaults import default_writers
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from ..checkpoint.checkpointer import BEST_CHECKPOINT, Checkpointer
from ..data import dataset_names
from .hooks import BestCheckpointer, EMAHook, build_ema
from .train_loop import DetectionTrainLoop

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with a LazyConfig in the place of a ``CfgNode``.

    Hooks, writers, checkpoints and the ``build_*`` / ``test`` class methods are those of
    ``DefaultTrainer``, and are overridden in the same way. See docs/training.md for the keys of
    ``train.*``.
    """

    def __init__(self, cfg: DictConfig):
        """
        Args:
            cfg: with the nodes model, dataloader, optimizer, lr_multiplier and train.
        """
        # Not DefaultTrainer's own constructor: it reads a CfgNode.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        train = cfg.train

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self.ema = build_ema(model, train.ema.decay) if train.ema.enabled else None
        ddp_model = create_ddp_model(
            model,
            device_ids=[comm.get_local_rank()] if _on_gpu(train.device) else None,
            **train.ddp,
        )
        self._trainer = DetectionTrainLoop(
            ddp_model,
            data_loader,
            optimizer,
            device=train.device,
            accumulation_steps=train.accumulation_steps,
            precision=train.amp.precision if train.amp.enabled else None,
            clip_norm=train.clip_grad.max_norm if train.clip_grad.enabled else None,
            clip_norm_type=train.clip_grad.norm_type,
            output_dir=train.output_dir,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            train.output_dir,
            trainer=weakref.proxy(self),
            **({"ema": self.ema} if self.ema is not None else {}),
        )
        self.start_iter = 0
        self.max_iter = train.max_iter
        self.register_hooks(self.build_hooks())
        _log_effective_batch(cfg)

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from ``train.output_dir``, or load the weights of ``train.init_checkpoint``.

        As ``DefaultTrainer.resume_or_load``.

        Raises:
            FileNotFoundError: ``train.init_checkpoint`` does not exist.
            ResumeError: the checkpoint to resume from belongs to another model.
        """
        self.checkpointer.resume_or_load(self.cfg.train.init_checkpoint, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
            logger.info(
                "resumed: %d of %d iterations are done, lr = %.3g",
                self.start_iter,
                self.max_iter,
                self.optimizer.param_groups[0]["lr"],
            )

    def train(self) -> dict[str, Any] | None:
        """Run training; returns the last evaluation's results, where there was one."""
        TrainerBase.train(self, self.start_iter, self.max_iter)
        return getattr(self, "_last_eval_results", None) if comm.is_main_process() else None

    def build_hooks(self) -> list[Any]:
        """Timing, learning rate, averaging, checkpoints, evaluation, best checkpoint, writers."""
        train = self.cfg.train
        module = self.checkpointer.model
        ret = [hooks.IterationTimer(), hooks.LRScheduler()]
        if self.ema is not None:
            ret.append(EMAHook(self.ema, module))
        if comm.is_main_process():
            ret.append(
                hooks.PeriodicCheckpointer(
                    self.checkpointer,
                    train.checkpointer.period,
                    max_to_keep=train.checkpointer.max_to_keep,
                )
            )

        def test_and_save_results() -> dict[str, Any]:
            model = self.model if self.ema is None else self.ema.module
            if self.ema is not None:
                logger.info("evaluating the averaged (EMA) weights")
            self._last_eval_results = self.test(self.cfg, model)
            return self._last_eval_results

        # After the checkpoint, so that it is there if the evaluation fails.
        ret.append(hooks.EvalHook(train.eval_period, test_and_save_results))
        if comm.is_main_process():
            best = train.best_checkpointer
            if best.enabled and train.eval_period > 0:
                ret.append(
                    BestCheckpointer(
                        train.eval_period,
                        self.checkpointer,
                        best.metric,
                        mode=best.mode,
                        file_prefix=BEST_CHECKPOINT,
                    )
                )
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=train.log_period))
        return ret

    def build_writers(self) -> list[Any]:
        """Console with the time left, JSON, TensorBoard."""
        return default_writers(self.cfg.train.output_dir, self.max_iter)

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        """Instantiate ``cfg.model`` on ``cfg.train.device``."""
        if _on_gpu(cfg.train.device) and not torch.cuda.is_available():
            raise ValueError(
                f"train.device={cfg.train.device}, but PyTorch sees no GPU: set train.device=cpu"
            )
        model = instantiate(cfg.model)
        logger.info("Model:\n%s", model)
        return model.to(cfg.train.device)

    @classmethod
    def build_optimizer(cls, cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
        """Instantiate ``cfg.optimizer`` for the model's parameters."""
        cfg = copy.deepcopy(cfg)
        cfg.optimizer.params.model = model
        return instantiate(cfg.optimizer)

    @classmethod
    def build_lr_scheduler(cls, cfg: DictConfig, optimizer: torch.optim.Optimizer) -> Any:
        """``cfg.lr_multiplier`` over ``cfg.train.max_iter`` iterations."""
        multiplier = instantiate(cfg.lr_multiplier)
        return LRMultiplier(optimizer, multiplier=multiplier, max_iter=cfg.train.max_iter)

    @classmethod
    def build_train_loader(cls, cfg: DictConfig) -> Any:
        """Instantiate ``cfg.dataloader.train``; warns of images with more objects than queries."""
        node = cfg.dataloader.train
        kwargs = {k: instantiate(node[k]) for k in node if k != "_target_"}
        num_queries = cfg.model.get("initial_queries", {}).get("num_queries")
        if num_queries is not None:
            _warn_of_crowded_images(kwargs["dataset"], num_queries)
        target = node["_target_"]
        return (
            instantiate({"_target_": target}, **kwargs)
            if isinstance(target, str)
            else target(**kwargs)
        )

    @classmethod
    def build_test_loader(cls, cfg: DictConfig, dataset_name: str) -> Any:
        """Instantiate ``cfg.dataloader.test`` for one data set of the catalogue."""
        cfg = copy.deepcopy(cfg)
        dataset = cfg.dataloader.test.dataset
        dataset.names = dataset_name
        dataset.update({k: None for k in ("json_file", "image_root", "name") if k in dataset})
        return instantiate(cfg.dataloader.test)

    @classmethod
    def build_evaluator(cls, cfg: DictConfig, dataset_name: str) -> DatasetEvaluator:
        """Instantiate ``cfg.dataloader.evaluator`` for one data set of the catalogue."""
        cfg = copy.deepcopy(cfg)
        evaluator = cfg.dataloader.evaluator
        evaluator.dataset_name = dataset_name
        evaluator.output_dir = str(_inference_folder(cfg, dataset_name))
        return instantiate(evaluator)

    @classmethod
    def test(
        cls,
        cfg: DictConfig,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluate a model on the test sets of a config; see ``DefaultTrainer.test``.

        Detectron2's table is printed, and the numbers are written to
        ``output_dir/inference/<data set>/metrics.json``. For a test set without annotations only
        the detections are written, in COCO's format for submissions.

        Returns:
            the results; by data set where there are several.
        """
        names = dataset_names(cfg.dataloader.test.dataset)
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise ValueError(f"{len(evaluators)} evaluators for {len(names)} test sets")
        results: dict[str, Any] = OrderedDict()
        for i, name in enumerate(names):
            loader = cls.build_test_loader(cfg, name)
            evaluator = evaluators[i] if evaluators else cls.build_evaluator(cfg, name)
            results[name] = inference_on_dataset(model, loader, evaluator) or {}
            if comm.is_main_process():
                _report(cfg, name, results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    @staticmethod
    def auto_scale_workers(cfg: DictConfig, num_workers: int) -> DictConfig:
        """Scale batch, learning rate and length to another number of processes.

        As ``DefaultTrainer.auto_scale_workers``, by ``train.reference_world_size``: images a
        process stay the same, the learning rate grows with the batch, iterations and periods
        shrink. Drops and warm-up are shares of the run, so they follow by themselves.

        Raises:
            ValueError: the batch cannot be shared evenly by the reference number of processes.
        """
        reference = cfg.train.reference_world_size
        if reference in (0, num_workers):
            return cfg
        cfg = copy.deepcopy(cfg)
        loader, train = cfg.dataloader.train, cfg.train
        if reference < 0 or loader.total_batch_size % reference:
            raise ValueError(
                f"train.reference_world_size={reference} does not divide "
                f"dataloader.train.total_batch_size={loader.total_batch_size}"
            )
        scale = num_workers / reference
        loader.total_batch_size = int(round(loader.total_batch_size * scale))
        cfg.optimizer.lr = cfg.optimizer.lr * scale
        train.max_iter = int(round(train.max_iter / scale))
        train.eval_period = int(round(train.eval_period / scale))
        train.checkpointer.period = max(1, int(round(train.checkpointer.period / scale)))
        train.reference_world_size = num_workers
        logger.info(
            "scaled from %d to %d processes: batch %d, learning rate %.3g, %d iterations",
            reference,
            num_workers,
            loader.total_batch_size,
            cfg.optimizer.lr,
            train.max_iter,
        )
        return cfg


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _inference_folder(cfg: DictConfig, dataset_name: str) -> Path:
    return Path(cfg.train.output_dir, "inference", dataset_name)


def _report(cfg: DictConfig, name: str, results: dict[str, Any]) -> None:
    folder = _inference_folder(cfg, name)
    if not results:
        logger.info(
            "%s has no annotations, or nothing was detected: the detections are in %s",
            name,
            folder / "coco_instances_results.json",
        )
        return
    logger.info("Evaluation results for %s in csv format:", name)
    print_csv_format(results)
    folder.mkdir(parents=True, exist_ok=True)
    classes = MetadataCatalog.get(name).get("thing_classes")
    document = {"dataset": name, "classes": classes, "results": results}
    (folder / "metrics.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def _warn_of_crowded_images(dataset: list[dict[str, Any]], num_queries: int) -> None:
    counts = [sum(not a.get("iscrowd", 0) for a in d.get("annotations", ())) for d in dataset]
    crowded = sum(count > num_queries for count in counts)
    if crowded:
        logger.warning(
            "%d of %d training images have more objects (up to %d) than the model has queries "
            "(%d): some objects are never matched. Raise model.initial_queries.num_queries",
            crowded,
            len(counts),
            max(counts),
            num_queries,
        )


def _log_effective_batch(cfg: DictConfig) -> None:
    images = cfg.dataloader.train.total_batch_size
    logger.info(
        "effective batch: %d images = %d a step over %d processes x %d accumulated; "
        "learning rate %.3g",
        images * cfg.train.accumulation_steps,
        images,
        comm.get_world_size(),
        cfg.train.accumulation_steps,
        cfg.optimizer.lr,
    )
