"""Detectron2's ``DefaultTrainer``, fed by a LazyConfig."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint.checkpointer import Checkpointer, ResumeError
from ..config import require_lazy_config
from ..data import build_train_loader, dataset_names, loader_process_errors
from ..errors import NonFinitePredictionError, UserError
from ..evaluation import check_stage_evaluation, configured_label_assigners
from ..texts import FILE_ONLY
from .evaluation import (
    EvaluationFacts,
    better_weights,
    evaluate_test_sets,
    inference_folder,
    metric_name,
    prefer_results_of,
)
from .evaluators import build_evaluators, check_evaluator
from .folder_lock import locked_run
from .hooks import (
    BestCheckpoint,
    EMAHook,
    EndOfMixing,
    EvaluationHook,
    PeriodicCheckpointer,
    StoppedEarly,
    build_ema,
)
from .interruption import Interruption
from .logs import log_end, log_start, log_training_set, refuse_linked_logs
from .random_states import is_random_state, restore_random_state
from .runs import changes_of_recipe, describe_run, plain_values
from .scaling import auto_scale_workers, log_effective_batch
from .settings import RunSettings
from .setup import classes_to_keep
from .trackers import RunFacts, build_trackers
from .train_loop import DetectionTrainLoop

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with a LazyConfig in the place of a ``CfgNode``.

    Hooks, writers, checkpoints and the ``build_*`` / ``test`` class methods are those of
    ``DefaultTrainer``, and are overridden in the same way. See docs/training.md for the keys of
    ``train.*``.

    Attributes:
        cfg: the config of the run, scaled to the number of processes.
        settings: its ``train`` as a value.
        evaluated_weights: "plain" or "averaged", those that the last evaluation's results are of.
    """

    def __init__(self, cfg: DictConfig):
        """
        Args:
            cfg: with the nodes model, dataloader, optimizer, lr_multiplier and train.
        """
        require_lazy_config(cfg, type(self).__name__)
        # Not DefaultTrainer's own constructor: it reads a CfgNode.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        settings = self.settings = RunSettings.from_config(cfg.train)
        if comm.is_main_process():  # also for a run without writers
            PathManager.mkdirs(settings.output_dir)
            refuse_linked_logs(settings.output_dir)

        model = self.build_model(cfg)
        freeze(model, settings.freeze)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        for name in dataset_names(cfg.dataloader.test.dataset):
            # What is wrong with it is told now, and not hours later.
            self.build_test_loader(cfg, name)
            with contextlib.suppress(NotImplementedError):  # evaluation says so
                check_evaluator(self.build_evaluator(cfg, name), "what build_evaluator returns")
        if settings.stage_evaluation:
            check_stage_evaluation(
                model,
                dataset_names(cfg.dataloader.test.dataset),
                configured_label_assigners(cfg),
            )
        self.ema = None
        if settings.ema.enabled:
            self.ema = build_ema(model, settings.ema.decay, warmup=settings.ema.warmup)
        self.evaluated_weights = "plain"
        ddp_model = create_ddp_model(
            model,
            # Not the local rank: under SLURM a process may see only its own GPU.
            device_ids=[torch.cuda.current_device()] if settings.on_gpu else None,
            **settings.ddp,
        )
        self._trainer = DetectionTrainLoop(
            ddp_model,
            data_loader,
            optimizer,
            device=settings.device,
            accumulation_steps=settings.accumulation_steps,
            precision=settings.amp.precision if settings.amp.enabled else None,
            clip_norm=settings.clip_grad.max_norm if settings.clip_grad.enabled else None,
            clip_norm_type=settings.clip_grad.norm_type,
            max_skipped_steps=settings.max_skipped_steps,
            output_dir=settings.output_dir,
            log_period=settings.log_period,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        facts = describe_run(cfg)
        self.checkpointer = Checkpointer(
            model,
            settings.output_dir,
            allow_pickle=settings.allow_pickle,
            init_prefix=settings.init_prefix,
            classes=classes_to_keep(cfg, facts["classes"]),
            run=facts,
            trainer=weakref.proxy(self),
            **({"ema": self.ema} if self.ema is not None else {}),
        )
        self.start_iter = 0
        self.max_iter = settings.max_iter
        self.interruption = Interruption()
        self._random_state: dict[str, Any] | None = None
        self.register_hooks(self.build_hooks())
        log_effective_batch(cfg)
        log_start(model, settings, dataset_names(cfg.dataloader.test.dataset))

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from ``train.output_dir``, or load the weights of ``train.init_checkpoint``.

        As ``DefaultTrainer.resume_or_load``. The random states come back when training begins.

        Raises:
            FileNotFoundError: ``train.init_checkpoint`` does not exist.
            CheckpointFileError: all checkpoints to resume from are damaged.
            ResumeError: the checkpoint to resume from belongs to another model, or some processes
                do not see it.
        """
        is_resumed = resume and self.checkpointer.has_checkpoint()
        weights = self.settings.init_checkpoint or ""
        if not is_resumed:
            logger.info("weights: %s", weights or "random ones")
        rest = self.checkpointer.resume_or_load(weights, resume=resume)
        if not resume:
            return
        is_resumed = self.checkpointer.has_checkpoint()
        if is_resumed:
            self.start_iter = self.iter + 1
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise ResumeError(
                f"the processes would go on from different iterations ({starts}): all machines "
                f"must see the same files in {self.settings.output_dir}"
            )
        if not is_resumed:
            logger.warning("%s holds nothing to resume", self.settings.output_dir)
            return
        recipe = (rest.get("run") or {}).get("recipe")
        recipe = recipe if isinstance(recipe, Mapping) else {}
        for line in changes_of_recipe(recipe, describe_run(self.cfg)["recipe"]):
            logger.warning(line)
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
        if not (isinstance(states, list) and all(map(is_random_state, states))):
            states = None
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
        with (
            locked_run(self.settings.output_dir),
            self.interruption.caught(),
            _deterministic(self.settings),
        ):
            done = self.max_iter
            with loader_process_errors("train"):
                try:
                    TrainerBase.train(self, self.start_iter, self.max_iter)
                except StoppedEarly as stop:
                    done = stop.iterations
        if comm.is_main_process():
            best = next((h.best for h in self._hooks if isinstance(h, EvaluationHook)), None)
            log_end(self.settings, done, best, self._last_evaluation())
        return getattr(self, "_last_eval_results", None) if comm.is_main_process() else None

    def run_step(self) -> None:
        """As Detectron2's; what is not logged yet is there for the writers after the last step."""
        super().run_step()
        if self.iter + 1 >= self.max_iter:
            self._trainer.write_scalars()

    def _last_evaluation(self) -> str | None:
        """Its result in words; None where there was none."""
        metric = metric_name(self.cfg, self.settings.best_checkpointer.metric)
        value = flatten_results_dict(getattr(self, "_last_eval_results", {})).get(metric)
        return None if value is None else f"{metric} {value:.2f}, {self.evaluated_weights} weights"

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
        try:
            self._trainer.write_scalars(alone=True)
        except Exception as error:
            logger.warning("the scalars of the last steps are lost: %s", error)
        for hook in self._hooks:
            if isinstance(hook, (hooks.EvalHook, hooks.BestCheckpointer)):
                continue
            try:
                hook.after_train()
            except Exception as error:  # the reason of the failure is worth more
                logger.warning("%s: %s", type(hook).__name__, error)

    def build_hooks(self) -> list[Any]:
        """Timing, learning rate, averaging, checkpoints, evaluation, best checkpoint, writers."""
        settings = self.settings
        module = self.checkpointer.model
        ret = [hooks.IterationTimer(), hooks.LRScheduler()]
        if settings.mix_until < 1:
            ret.append(EndOfMixing(settings.last_mixed_iteration))
        if self.ema is not None:
            ret.append(EMAHook(self.ema, module))
        checkpoint_hook = PeriodicCheckpointer(
            self.checkpointer,
            settings.checkpointer.period,
            max_to_keep=settings.checkpointer.max_to_keep,
            interruption=self.interruption,
            device=settings.device,
        )
        best, stopping = None, settings.early_stopping
        if settings.best_checkpointer.enabled and settings.eval_period > 0:
            best = BestCheckpoint(
                self.checkpointer,
                metric_name(self.cfg, settings.best_checkpointer.metric),
                mode=settings.best_checkpointer.mode,
                averaged=None if self.ema is None else self.ema.module,
            )
        evaluation_hook = EvaluationHook(
            settings.eval_period,
            self._test_and_save_results,
            output_dir=settings.output_dir,
            best=best,
            end_run=checkpoint_hook.stop,
            patience=stopping.patience if stopping.enabled else None,
            end_early=checkpoint_hook.finish_early,
        )
        # After the checkpoint, so that it is there if the evaluation fails.
        ret += [checkpoint_hook, evaluation_hook]
        if comm.is_main_process():
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=settings.log_period))
        return ret

    def _test_and_save_results(self) -> dict[str, Any]:
        """Of the weights that count; where there are two, of each under its name as well."""
        models = {}
        if self.ema is None or self.settings.ema.compare:
            models["plain"] = self.model
        if self.ema is not None:
            models["averaged"] = self.ema.module
        results, problem = {}, None
        for weights, model in models.items():
            try:
                results[weights] = self._test_weights(model, weights)
            except NonFinitePredictionError as error:  # in all processes
                problem = error
                logger.warning("the %s weights are not evaluated: %s", weights, error)
        if not results:
            assert problem is not None
            raise problem
        self.evaluated_weights, *others = results
        self._last_eval_results = results[self.evaluated_weights]
        if others and comm.is_main_process():
            best = self.settings.best_checkpointer
            metric = metric_name(self.cfg, best.metric)
            self.evaluated_weights = better_weights(results, metric, mode=best.mode)
            prefer_results_of(self.cfg, self.evaluated_weights)
            self._last_eval_results = {**results[self.evaluated_weights], **results}
        return self._last_eval_results

    def _test_weights(self, model: nn.Module, weights: str) -> dict[str, Any]:
        if self.ema is not None:
            shown = "averaged (EMA)" if weights == "averaged" else weights
            logger.info("evaluating the %s weights", shown)
        facts = EvaluationFacts(
            averaged=weights == "averaged",
            # Only at the end: it takes several times as long.
            by_stage=self.settings.stage_evaluation and self.iter + 1 >= self.max_iter,
            interruption=self.interruption,
            source=f"iteration {min(self.iter + 1, self.max_iter)} of the run",
        )
        with facts.of_run():  # so that it may be overridden as in Detectron2
            return self.test(self.cfg, model) or {}

    def build_writers(self) -> list[Any]:
        """Console with the time left, JSON, and what ``train.trackers`` lists."""
        output_dir = self.settings.output_dir
        trainer = weakref.proxy(self)  # a hook holds the writers
        facts = RunFacts(
            output_dir=Path(output_dir),
            config=lambda: plain_values(trainer.cfg),
            max_iter=self.max_iter,
            start_iter=lambda: trainer.start_iter,
        )
        return [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(output_dir, "metrics.json")),
            *build_trackers(self.settings.trackers, facts),
        ]

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        """Instantiate ``cfg.model`` on ``cfg.train.device``."""
        settings = RunSettings.from_config(cfg.train)
        if settings.on_gpu and not torch.cuda.is_available():
            raise UserError(
                f"train.device={settings.device}, but PyTorch sees no GPU: set train.device=cpu"
            )
        model = instantiate(cfg.model)
        logger.info("Model:\n%s", model, extra=FILE_ONLY)
        return model.to(settings.device)

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
        max_iter = RunSettings.from_config(cfg.train).max_iter
        return LRMultiplier(optimizer, multiplier=multiplier, max_iter=max_iter)

    @classmethod
    def build_train_loader(cls, cfg: DictConfig) -> Any:
        """Instantiate ``cfg.dataloader.train``; warns of images with more objects than queries.

        Raises:
            UserError: ``train.mix_until``, for a loader or mapper that puts no images together.
        """
        node = copy.deepcopy(cfg.dataloader.train)
        settings = RunSettings.from_config(cfg.train)
        if settings.mix_until < 1:
            _check_is_ours(node)
            images = node.total_batch_size * settings.accumulation_steps
            node.mix_until = settings.last_mixed_iteration * images
        if "dataset" not in node:  # a loader that makes its own
            return instantiate(node)
        dataset = instantiate(node.dataset)
        log_training_set(dataset_names(node.dataset), dataset)
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
        keys = ("json_file", "path", "image_root", "name")
        dataset.update({k: None for k in keys if k in dataset})
        return instantiate(cfg.dataloader.test)

    @classmethod
    def build_evaluator(cls, cfg: DictConfig, dataset_name: str) -> DatasetEvaluator:
        """Instantiate ``cfg.dataloader.evaluator``, or several, for a data set of the catalogue."""
        return build_evaluators(cfg, dataset_name, str(inference_folder(cfg, dataset_name)))

    @classmethod
    def test(
        cls,
        cfg: DictConfig,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
        *,
        facts: EvaluationFacts | None = None,
    ) -> dict[str, Any]:
        """Evaluate a model on the test sets of a config; see ``DefaultTrainer.test``.

        Detectron2's table is printed, and the numbers are written to
        ``output_dir/inference/<data set>/metrics.json``. For a test set without annotations only
        the detections are written, in COCO's format for submissions. With
        ``train.stage_evaluation`` the metrics of every stage are written beside, to
        ``stage_metrics.json``. With ``train.amp.evaluation`` the network runs in
        ``train.amp.precision``; boxes and scores stay in float32.

        A run calls it as Detectron2 does, with config and model, so that a subclass may override it
        with Detectron2's signature.

        Args:
            cfg, model, evaluators: see ``DefaultTrainer.test``.
            facts: about the weights and this evaluation; None: those of the run that evaluates,
                and without a run, what the config asks for.

        Returns:
            the results; by data set where there are several.

        Raises:
            ValueError: ``train.stage_evaluation`` for a model without stages, or for a test set
                without annotations; or the device lacks ``train.amp.precision``.
            LoaderProcessError: a process that loads the test images has ended; names those that
                were being loaded.
        """
        return evaluate_test_sets(
            cfg,
            model,
            evaluators,
            facts=facts or EvaluationFacts.current(cfg),
            build_loader=cls.build_test_loader,
            build_evaluator=cls.build_evaluator,
        )

    @staticmethod
    def auto_scale_workers(cfg: DictConfig, num_workers: int) -> DictConfig:
        """Scale batch, learning rate and length to another number of processes.

        See :func:`detection_toolkit.engine.scaling.auto_scale_workers`.
        """
        return auto_scale_workers(cfg, num_workers)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Keep parameters as they are, in place.

    Args:
        model: whose ``requires_grad`` are set.
        patterns: names as in ``named_parameters``, with * for any part.

    Raises:
        UserError: a pattern that fits no parameter, or all are frozen.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            parts = sorted({name.split(".")[0] for name in parameters})
            raise UserError(
                f"train.freeze: no parameter's name fits {pattern!r}; they begin with "
                f"{', '.join(parts)}, and {pattern}.* stands for all that follows {pattern}."
            )
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"train.freeze={list(patterns)} leaves nothing to train")
    if patterns:
        frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
        total = sum(p.numel() for p in parameters.values())
        logger.info("%s of %s parameters are frozen", f"{frozen:,}", f"{total:,}")


@contextlib.contextmanager
def _deterministic(settings: RunSettings) -> Iterator[None]:
    """PyTorch's deterministic algorithms where ``train.deterministic`` asks for them."""
    if not settings.deterministic:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if settings.on_gpu:
        # What PyTorch demands of cuBLAS, where the user has not chosen.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"train.deterministic=true: {operation} adds numbers on a GPU in whatever order they "
            "come. Choose parts that do without it (model.execution.sampling=auto in the place of "
            "grid, a backbone without deformable convolutions), or set train.deterministic=false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def _check_is_ours(node: DictConfig) -> None:
    """
    Raises:
        UserError: a loader that knows no positions.
    """
    target = node.get("_target_")
    if (locate(target) if isinstance(target, str) else target) is not build_train_loader:
        raise UserError(
            "train.mix_until is for detection_toolkit.data.build_train_loader, and "
            "dataloader.train is another loader: set train.mix_until=1"
        )


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
