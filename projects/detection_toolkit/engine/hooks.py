"""Hooks that Detectron2 lacks, or that must outlive an interruption."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.utils import comm
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.durable import write_durably
from ..errors import UserError
from .interruption import InterruptedRun, Interruption
from .random_states import capture_random_state, preserved_random_state

__all__ = [
    "BestCheckpointer",
    "EMAHook",
    "EvalHook",
    "EvaluationRecord",
    "InterruptibleLoader",
    "PeriodicCheckpointer",
    "build_ema",
]

logger = logging.getLogger(__name__)


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of parameters and buffers, as a model of its own.

    Raises:
        ValueError: the decay is not in (0, 1).
    """
    if not 0.0 < decay < 1.0:
        raise UserError(f"train.ema.decay must lie between 0 and 1, got {decay}")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averaged.requires_grad_(False)
    return averaged


class EMAHook(HookBase):
    """Updates the average after every step. The first update copies the weights."""

    def __init__(self, averaged: AveragedModel, model: nn.Module):
        self.averaged = averaged
        self.model = model

    @torch.no_grad()
    def after_step(self) -> None:
        self.averaged.update_parameters(self.model)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, with the random states of all processes, and for a run that is to end.

    It belongs to every process, as each has a random state; the main one writes. Old checkpoints
    are removed after the new one is there, also those of a run before it was resumed.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        *,
        max_to_keep: int | None,
        interruption: Interruption,
        device: str,
    ):
        """
        Args:
            checkpointer, period, max_to_keep: see Detectron2's.
            interruption: asked after every step.
            device: of the processes, for asking each other.
        """
        super().__init__(checkpointer, period, max_to_keep=max_to_keep)
        self._interruption = interruption
        self._device = device

    def after_step(self) -> None:
        """Write a checkpoint if one is due.

        Raises:
            InterruptedRun: after it is written, when the run has been asked to end.
        """
        iteration = self.trainer.iter
        ends = self._interruption.agreed(self._device)
        is_last = iteration >= self.max_iter - 1
        if ends and not is_last:
            self.stop()
        if (iteration + 1) % self.period == 0 or is_last:
            states = _gather_random_states()
            if comm.is_main_process():
                self.step(iteration, random_states=states)
        if ends:
            self._end()

    def step(self, iteration: int, **kwargs: Any) -> None:
        """As Detectron2's."""
        if (iteration + 1) % self.period == 0:
            self._save(iteration, f"model_{iteration:07d}", **kwargs)
        if iteration >= self.max_iter - 1:
            self._save(iteration, "model_final", **kwargs)

    def stop(self) -> None:
        """Write a checkpoint of the last step in every case, and end the run.

        Raises:
            InterruptedRun: always.
        """
        iteration = self.trainer.iter
        states = _gather_random_states()
        if comm.is_main_process():
            self._save(iteration, f"model_{iteration:07d}", random_states=states)
        self._end()

    def _save(self, iteration: int, name: str, **kwargs: Any) -> None:
        self.checkpointer.save(name, iteration=iteration, **kwargs)
        if self.max_to_keep is not None:
            self.checkpointer.prune(self.max_to_keep, iteration)

    def _end(self) -> None:
        comm.synchronize()  # else the launcher might end the one that still writes
        logger.warning(
            "%s: a checkpoint is written after iteration %d; --resume goes on from it",
            self._interruption.signal_name or "a signal to another process",
            self.trainer.iter,
        )
        raise InterruptedRun


def _gather_random_states() -> list[dict[str, Any]]:
    """Of all processes, in the main one; empty in others."""
    return comm.gather(capture_random_state())


class _InterruptedEvaluation(Exception):
    """A signal has come within an evaluation."""


class InterruptibleLoader:
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
                raise _InterruptedEvaluation
            yield batch


class EvaluationRecord(HookBase):
    """Notes in a file which evaluation was the last, when all that follows from it is done."""

    def __init__(self, path: Path, period: int):
        """
        Args:
            path: of the file; the main process alone reads and writes it.
            period: of the evaluations.
        """
        self._path = path
        self._period = period

    def is_due(self, iterations: int) -> bool:
        """Whether an evaluation belongs to so many iterations, the end of the run apart."""
        end = self.trainer.max_iter
        return self._period > 0 and iterations % self._period == 0 and 0 < iterations < end

    def is_owed(self) -> bool:
        """Whether the run goes on from a checkpoint that has not been evaluated yet."""
        start = self.trainer.start_iter
        if not self.is_due(start):
            return False
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))["iterations"] != start
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            self._path.unlink(missing_ok=True)  # of another run
        elif self.is_due(self.trainer.start_iter):
            self._write(self.trainer.start_iter)

    def after_step(self) -> None:
        if self.is_due(self.trainer.iter + 1):
            self._write(self.trainer.iter + 1)

    def _write(self, iterations: int) -> None:
        document = json.dumps({"iterations": iterations}).encode()
        write_durably(self._path, lambda file: file.write(document))


@contextlib.contextmanager
def _as_after_last_step(trainer: TrainerBase) -> Iterator[None]:
    """Let what belongs to the last step of the interrupted run have its number."""
    start = trainer.start_iter
    trainer.iter = trainer.storage.iter = start - 1
    try:
        yield
    finally:
        trainer.storage.iter = start
        trainer.iter = start


class EvalHook(hooks.EvalHook):
    """Detectron2's, which makes up for an evaluation that an interruption has prevented.

    A run is resumed from a checkpoint that was written before the evaluation of the same
    iteration. The random numbers that an evaluation draws are none of training's.
    """

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], dict[str, Any]],
        *,
        record: EvaluationRecord,
        checkpoint_hook: PeriodicCheckpointer,
    ):
        """
        Args:
            eval_period, eval_function: see Detectron2's.
            record: of the last evaluation; registered after all hooks that use the results.
            checkpoint_hook: writes a checkpoint where an evaluation is interrupted.
        """
        super().__init__(eval_period, eval_function)
        self._record = record
        self._checkpoint_hook = checkpoint_hook
        self.has_made_up = False

    def before_train(self) -> None:
        owed = comm.is_main_process() and self._record.is_owed()
        if not any(comm.all_gather(owed)):
            return
        logger.info("making up for the evaluation after %d iterations", self.trainer.start_iter)
        with _as_after_last_step(self.trainer):
            self._do_eval()
        self.has_made_up = True

    def _do_eval(self) -> None:
        try:
            with preserved_random_state():
                super()._do_eval()
        except _InterruptedEvaluation:
            logger.warning("the evaluation is cut short; --resume makes up for it")
            if self.trainer.iter >= self.trainer.max_iter:  # the last checkpoint is there
                raise InterruptedRun from None
            self._checkpoint_hook.stop()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's ``BestCheckpointer`` that a resumed run does not start anew.

    The best value stands in a file beside the checkpoint that has it, written after it.
    """

    def __init__(self, *args: Any, eval_hook: EvalHook, **kwargs: Any):
        """
        Args:
            args, kwargs: see Detectron2's.
            eval_hook: what produces the metric.
        """
        super().__init__(*args, **kwargs)
        self._eval_hook = eval_hook

    @property
    def _path(self) -> Path:
        return Path(self._checkpointer.save_dir, f"{self._file_prefix}.json")

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and self._path.is_file():
            try:
                record = json.loads(self._path.read_text(encoding="utf-8"))
                if record["metric"] == self._val_metric:
                    self.best_metric, self.best_iter = record["value"], record["iteration"]
            except (ValueError, KeyError, TypeError):
                logger.warning("%s is damaged: the best value is sought anew", self._path)
        if self._eval_hook.has_made_up:
            with _as_after_last_step(self.trainer):
                self._best_checking()

    def _best_checking(self) -> None:
        before = self.best_metric, self.best_iter
        super()._best_checking()
        if (self.best_metric, self.best_iter) == before:
            return
        record = {
            "metric": self._val_metric,
            "value": self.best_metric,
            "iteration": self.best_iter,
        }
        document = json.dumps(record).encode()
        write_durably(self._path, lambda file: file.write(document))
