"""Detectron2's ``DefaultTrainer``, fed by a LazyConfig."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.engine.defaults import default_writers
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint.checkpointer import BEST_CHECKPOINT, Checkpointer, ResumeError
from ..data import dataset_names, loader_process_errors
from ..errors import UserError
from ..evaluation import check_stage_evaluation, evaluate_stages
from .hooks import (
    BestCheckpointer,
    EMAHook,
    EvalHook,
    EvaluationRecord,
    InterruptibleLoader,
    PeriodicCheckpointer,
    build_ema,
)
from .interruption import Interruption
from .precision import autocast_dtype
from .random_states import restore_random_state
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
        for name in dataset_names(cfg.dataloader.test.dataset):
            # What is wrong with it is told now, and not hours later.
            self.build_test_loader(cfg, name)
        if train.get("stage_evaluation"):
            check_stage_evaluation(model, dataset_names(cfg.dataloader.test.dataset))
        self.ema = build_ema(model, train.ema.decay) if train.ema.enabled else None
        ddp_model = create_ddp_model(
            model,
            # Not the local rank: under SLURM a process may see only its own GPU.
            device_ids=[torch.cuda.current_device()] if _on_gpu(train.device) else None,
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
            max_skipped_steps=train.get("max_skipped_steps", 0),
            output_dir=train.output_dir,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            train.output_dir,
            allow_pickle=train.get("allow_pickle", False),
            init_prefix=train.get("init_prefix", ""),
            trainer=weakref.proxy(self),
            **({"ema": self.ema} if self.ema is not None else {}),
        )
        self.start_iter = 0
        self.max_iter = train.max_iter
        self.interruption = Interruption()
        self._random_state: dict[str, Any] | None = None
        self.register_hooks(self.build_hooks())
        _log_effective_batch(cfg)

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from ``train.output_dir``, or load the weights of ``train.init_checkpoint``.

        As ``DefaultTrainer.resume_or_load``. The random states come back when training begins.

        Raises:
            FileNotFoundError: ``train.init_checkpoint`` does not exist.
            CheckpointFileError: all checkpoints to resume from are damaged.
            ResumeError: the checkpoint to resume from belongs to another model, or some processes
                do not see it.
        """
        rest = self.checkpointer.resume_or_load(self.cfg.train.init_checkpoint, resume=resume)
        if not resume:
            return
        is_resumed = self.checkpointer.has_checkpoint()
        if is_resumed:
            self.start_iter = self.iter + 1
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise ResumeError(
                f"the processes would go on from different iterations ({starts}): all machines "
                f"must see the same files in {self.cfg.train.output_dir}"
            )
        if not is_resumed:
            logger.warning("%s holds nothing to resume", self.cfg.train.output_dir)
            return
        self._restore_random_states(rest.get("random_states"))
        if self.ema is not None and int(self.ema.n_averaged) == 0:
            logger.warning("the checkpoint holds no averaged weights: the average begins here")
        elif self.ema is None and "ema" in rest:
            logger.warning("the averaged weights of the checkpoint are not continued")
        logger.info(
            "resumed: %d of %d iterations are done, lr = %.3g",
            self.start_iter,
            self.max_iter,
            self.optimizer.param_groups[0]["lr"],
        )

    def _restore_random_states(self, states: list[dict[str, Any]] | None) -> None:
        before, now = len(states or ()), comm.get_world_size()
        if not before:
            logger.warning(
                "the checkpoint holds no random states: what is random in the model goes on with "
                "other numbers"
            )
            return
        if before != now:
            logger.warning(
                "the run goes on with %d process(es) instead of %d. The order of the images and "
                "their augmentation are kept; which of them make up a step, and the random "
                "numbers that the model itself draws, are not",
                now,
                before,
            )
        if comm.get_rank() < before:
            self._random_state = states[comm.get_rank()]

    def state_dict(self) -> dict[str, Any]:
        """As Detectron2's, with the place in the stream of the training images."""
        state = super().state_dict()
        if hasattr(self.data_loader, "state_dict"):
            state["stream"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        lost = None
        if not hasattr(self.data_loader, "load_state_dict"):
            lost = f"a {type(self.data_loader).__name__} does not know its place, it begins anew"
        elif "stream" not in state_dict:
            lost = "the checkpoint does not tell the place in it, it begins anew"
        else:
            lost = self.data_loader.load_state_dict(state_dict["stream"])
        if lost:
            logger.warning("the stream of training images is not continued: %s", lost)

    def train(self) -> dict[str, Any] | None:
        """Run training; returns the last evaluation's results, where there was one.

        Raises:
            InterruptedRun: SIGTERM or SIGUSR1 has come, and a checkpoint is written.
            LoaderProcessError: a process that loads images has ended.
        """
        with self.interruption.caught(), _deterministic(self.cfg.train):
            with loader_process_errors("train"):
                TrainerBase.train(self, self.start_iter, self.max_iter)
        return getattr(self, "_last_eval_results", None) if comm.is_main_process() else None

    def before_train(self) -> None:
        if self._random_state is not None:
            restore_random_state(self._random_state)
            self._random_state = None
        super().before_train()

    def after_train(self) -> None:
        """As Detectron2's; a run that has failed or was interrupted is not evaluated any more."""
        if self.iter >= self.max_iter:  # it is counted up once more after the last step
            super().after_train()
            return
        for hook in self._hooks:
            if isinstance(hook, (hooks.EvalHook, hooks.BestCheckpointer)):
                continue
            try:
                hook.after_train()
            except Exception as error:  # the reason of the failure is worth more
                logger.warning("%s: %s", type(hook).__name__, error)

    def build_hooks(self) -> list[Any]:
        """Timing, learning rate, averaging, checkpoints, evaluation, best checkpoint, writers."""
        train = self.cfg.train
        module = self.checkpointer.model
        ret = [hooks.IterationTimer(), hooks.LRScheduler()]
        if self.ema is not None:
            ret.append(EMAHook(self.ema, module))
        checkpoint_hook = PeriodicCheckpointer(
            self.checkpointer,
            train.checkpointer.period,
            max_to_keep=train.checkpointer.max_to_keep,
            interruption=self.interruption,
            device=train.device,
        )
        ret.append(checkpoint_hook)

        def test_and_save_results() -> dict[str, Any]:
            model = self.model if self.ema is None else self.ema.module
            if self.ema is not None:
                logger.info("evaluating the averaged (EMA) weights")
            cfg = self.cfg
            if cfg.train.get("stage_evaluation") and self.iter + 1 < self.max_iter:
                # By stage only at the end: it takes several times as long.
                cfg = copy.deepcopy(cfg)
                cfg.train.stage_evaluation = False
            self._last_eval_results = self.test(cfg, model, interruption=self.interruption)
            return self._last_eval_results

        record = EvaluationRecord(Path(train.output_dir, "last_evaluation.json"), train.eval_period)
        eval_hook = EvalHook(
            train.eval_period,
            test_and_save_results,
            record=record,
            checkpoint_hook=checkpoint_hook,
        )
        # After the checkpoint, so that it is there if the evaluation fails.
        ret.append(eval_hook)
        if comm.is_main_process():
            best = train.best_checkpointer
            if best.enabled and train.eval_period > 0:
                ret.append(
                    BestCheckpointer(
                        train.eval_period,
                        self.checkpointer,
                        _metric_name(self.cfg, best.metric),
                        mode=best.mode,
                        file_prefix=BEST_CHECKPOINT,
                        eval_hook=eval_hook,
                    )
                )
            ret.append(record)
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=train.log_period))
        record.trainer = weakref.proxy(self)  # every process asks it
        return ret

    def build_writers(self) -> list[Any]:
        """Console with the time left, JSON, TensorBoard."""
        return default_writers(self.cfg.train.output_dir, self.max_iter)

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        """Instantiate ``cfg.model`` on ``cfg.train.device``."""
        if _on_gpu(cfg.train.device) and not torch.cuda.is_available():
            raise UserError(
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
        node = copy.deepcopy(cfg.dataloader.train)
        if "dataset" not in node:  # a loader that makes its own
            return instantiate(node)
        dataset = instantiate(node.dataset)
        num_queries = OmegaConf.select(cfg, "model.initial_queries.num_queries")
        if num_queries is not None:
            _warn_of_crowded_images(dataset, num_queries)
        # As callables: a config must not convert a hundred thousand dicts to its own.
        node.dataset = L(lambda: dataset)()
        return instantiate(node)

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
        *,
        interruption: Interruption | None = None,
    ) -> dict[str, Any]:
        """Evaluate a model on the test sets of a config; see ``DefaultTrainer.test``.

        Detectron2's table is printed, and the numbers are written to
        ``output_dir/inference/<data set>/metrics.json``. For a test set without annotations only
        the detections are written, in COCO's format for submissions. With
        ``train.stage_evaluation`` the metrics of every stage are written beside, to
        ``stage_metrics.json``. With ``train.amp.evaluation`` the network runs in
        ``train.amp.precision``; boxes and scores stay in float32.

        Returns:
            the results; by data set where there are several.

        Raises:
            ValueError: ``train.stage_evaluation`` for a model without stages, or for a test set
                without annotations; or the device lacks ``train.amp.precision``.
            LoaderProcessError: a process that loads the test images has ended; names those that
                were being loaded.
        """
        names = dataset_names(cfg.dataloader.test.dataset)
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise UserError(f"{len(evaluators)} evaluators for {len(names)} test sets")
        results: dict[str, Any] = OrderedDict()
        for i, name in enumerate(names):
            loader = cls.build_test_loader(cfg, name)
            # A loader of another project has its own errors.
            explained = getattr(loader, "process_errors", contextlib.nullcontext)
            if interruption is not None:
                loader = InterruptibleLoader(loader, interruption)
            evaluator = evaluators[i] if evaluators else cls.build_evaluator(cfg, name)
            with _autocast_in_evaluation(cfg.train), explained():
                if cfg.train.get("stage_evaluation"):
                    results[name] = _evaluate_stages(cfg, model, loader, evaluator, name)
                else:
                    _forget_stages(cfg, name)
                    results[name] = inference_on_dataset(model, loader, evaluator) or {}
            if comm.is_main_process():
                _report(cfg, name, results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    @staticmethod
    def auto_scale_workers(cfg: DictConfig, num_workers: int) -> DictConfig:
        """Scale batch, learning rate and length to another number of processes.

        As ``DefaultTrainer.auto_scale_workers``, by ``train.reference_world_size``: images a
        process stay the same, the learning rate grows with the batch, iterations and periods
        shrink. Drops and warm-up are shares of the run, so they follow by themselves; drops that
        are given in iterations of ``${train.max_iter}`` are scaled with it.

        Raises:
            ValueError: the batch cannot be shared evenly by the reference number of processes.
        """
        reference = cfg.train.reference_world_size
        if reference in (0, num_workers):
            return cfg
        cfg = copy.deepcopy(cfg)
        loader, train = cfg.dataloader.train, cfg.train
        if reference < 0 or loader.total_batch_size % reference:
            raise UserError(
                f"train.reference_world_size={reference} does not divide "
                f"dataloader.train.total_batch_size={loader.total_batch_size}"
            )
        scale = num_workers / reference
        loader.total_batch_size = int(round(loader.total_batch_size * scale))
        cfg.optimizer.lr = cfg.optimizer.lr * scale
        schedule = OmegaConf.select(cfg, "lr_multiplier.scheduler")
        updates = _num_updates(schedule)
        train.max_iter = _fewer(train.max_iter, scale)
        if updates != _num_updates(schedule):
            schedule.milestones = [_fewer(m, scale) for m in schedule.milestones]
        if train.eval_period > 0:
            train.eval_period = _fewer(train.eval_period, scale)
        train.checkpointer.period = _fewer(train.checkpointer.period, scale)
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


def _autocast_in_evaluation(train: DictConfig) -> torch.autocast | contextlib.nullcontext:
    if not train.amp.get("evaluation", False):
        return contextlib.nullcontext()
    dtype = autocast_dtype(train.amp.precision, train.device)
    return torch.autocast(torch.device(train.device).type, dtype=dtype)


@contextlib.contextmanager
def _deterministic(train: DictConfig) -> Iterator[None]:
    """PyTorch's deterministic algorithms where ``train.deterministic`` asks for them."""
    if not train.get("deterministic", False):
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if _on_gpu(train.device):
        # What PyTorch demands of cuBLAS, where the user has not chosen.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Some gradients, as of grid_sample, have no deterministic form on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=_on_gpu(train.device))
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _inference_folder(cfg: DictConfig, dataset_name: str) -> Path:
    return Path(cfg.train.output_dir, "inference", dataset_name)


def _fewer(iterations: int, scale: float) -> int:
    return max(1, int(round(iterations / scale)))


def _num_updates(schedule: Any) -> int | None:
    """The iterations that the drops of a schedule are counted in, where it has both."""
    if not isinstance(schedule, DictConfig) or schedule.get("milestones") is None:
        return None
    return schedule.get("num_updates")


def _images_a_step(cfg: DictConfig) -> int:
    return cfg.dataloader.train.total_batch_size * cfg.train.accumulation_steps


def _metric_name(cfg: DictConfig, metric: str) -> str:
    """With several test sets metrics begin with the set's name; the first one's is meant."""
    names = dataset_names(cfg.dataloader.test.dataset)
    if len(names) == 1 or any(metric.startswith(f"{name}/") for name in names):
        return metric
    return f"{names[0]}/{metric}"


def _evaluate_stages(
    cfg: DictConfig, model: nn.Module, loader: Any, evaluator: DatasetEvaluator, name: str
) -> dict[str, Any]:
    """Evaluate as always, and leave the metrics of every stage in ``stage_metrics.json``."""
    path = _inference_folder(cfg, name) / "stage_metrics.json"
    weights = "averaged" if cfg.train.ema.enabled else "plain"
    if comm.is_main_process():
        _keep_results_of_other_weights(path, weights)
    results, _ = evaluate_stages(
        model,
        loader,
        evaluator,
        dataset_name=name,
        max_dets_per_image=OmegaConf.select(cfg, "dataloader.evaluator.max_dets_per_image"),
        output_file=path,
        facts={"weights": weights},
    )
    return results


def _forget_stages(cfg: DictConfig, name: str) -> None:
    """Metrics by stage of an earlier evaluation do not go with the detections of this one."""
    if comm.is_main_process():
        (_inference_folder(cfg, name) / "stage_metrics.json").unlink(missing_ok=True)


def _report(cfg: DictConfig, name: str, results: dict[str, Any]) -> None:
    """Print the results of one test set and write them to a file."""
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
    path = folder / "metrics.json"
    weights = "averaged" if cfg.train.ema.enabled else "plain"
    _keep_results_of_other_weights(path, weights)
    document = {
        "dataset": name,
        "classes": MetadataCatalog.get(name).get("thing_classes"),
        "weights": weights,
        "results": {
            # A metric without any object, as APs without small ones, is NaN, which JSON lacks.
            task: {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            for task, metrics in results.items()
        },
    }
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def _keep_results_of_other_weights(path: Path, weights: str) -> None:
    """Averaged weights do not overwrite the results of plain ones, nor the reverse."""
    try:
        other = json.loads(path.read_text(encoding="utf-8")).get("weights")
    except (FileNotFoundError, json.JSONDecodeError):
        return
    if other in ("plain", "averaged") and other != weights:
        kept = path.with_name(f"{path.stem}_{other}{path.suffix}")
        path.replace(kept)
        logger.info("the results of the %s weights are kept in %s", other, kept)


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
    logger.info(
        "effective batch: %d images = %d a step over %d processes x %d accumulated; "
        "learning rate %.3g",
        _images_a_step(cfg),
        cfg.dataloader.train.total_batch_size,
        comm.get_world_size(),
        cfg.train.accumulation_steps,
        cfg.optimizer.lr,
    )
