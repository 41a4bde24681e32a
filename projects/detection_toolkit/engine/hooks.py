"""Hooks that Detectron2 lacks, or that must outlive an interruption."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint.checkpointer import BEST_CHECKPOINT, Checkpointer
from ..durable import write_text
from ..errors import NonFinitePredictionError
from ..texts import parse_json
from .evaluation import InterruptedEvaluation
from .interruption import InterruptedRun, Interruption
from .random_states import capture_random_state, preserved_random_state

__all__ = [
    "BestCheckpoint",
    "EMAHook",
    "EndOfMixing",
    "EvaluationHook",
    "PeriodicCheckpointer",
    "StoppedEarly",
    "build_ema",
    "ema_decay",
    "iterations_done",
]

logger = logging.getLogger(__name__)


class StoppedEarly(BaseException):
    """The run has ended before its last step, as it got no better.

    Attributes:
        iterations: that it has done.
    """

    def __init__(self, iterations: int):
        super().__init__(iterations)
        self.iterations = iterations


def build_ema(model: nn.Module, decay: float, *, warmup: bool = False) -> AveragedModel:
    """Exponential moving average of parameters and buffers, as a model of its own.

    Args:
        model: what is averaged.
        decay: what the average keeps of itself per update.
        warmup: keep only ``ema_decay`` of it.
    """

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor) -> None:
        kept = ema_decay(int(updates), decay) if warmup else decay
        get_ema_multi_avg_fn(kept)(averaged, current, updates)

    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    averaged.requires_grad_(False)
    return averaged


def ema_decay(updates: int, decay: float) -> float:
    """What an average that warms up keeps of itself after so many updates."""
    return min(decay, (1 + updates) / (10 + updates))


class EMAHook(HookBase):
    """Updates the average after every step. The first update copies the weights."""

    def __init__(self, averaged: AveragedModel, model: nn.Module):
        self.averaged = averaged
        self.model = model

    @torch.no_grad()
    def after_step(self) -> None:
        self.averaged.update_parameters(self.model)


class EndOfMixing(HookBase):
    """Says when images begin to come by themselves; the loader does it, by their position."""

    def __init__(self, iterations: int):
        """
        Args:
            iterations: before that.
        """
        self._iterations = iterations

    def before_step(self) -> None:
        now, start = self.trainer.iter, self.trainer.start_iter
        if now == max(self._iterations, start):
            logger.info(
                "mosaic, mixup and copy-paste have ended after %d iterations (train.mix_until): "
                "every image comes by itself",
                self._iterations,
            )


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

    def stop(self) -> NoReturn:
        """Write a checkpoint of the last step in every case, and end the run.

        Raises:
            InterruptedRun: always.
        """
        iteration = self.trainer.iter
        states = _gather_random_states()
        if comm.is_main_process():
            self._save(iteration, f"model_{iteration:07d}", random_states=states)
        self._end()

    def finish_early(self) -> NoReturn:
        """Write the last checkpoint of a run that needs no more steps.

        Raises:
            StoppedEarly: always.
        """
        states = _gather_random_states()
        if comm.is_main_process():
            self._save(self.trainer.iter, "model_final", random_states=states)
        comm.synchronize()
        raise StoppedEarly(self.trainer.iter + 1)

    def _save(self, iteration: int, name: str, **kwargs: Any) -> None:
        self.checkpointer.save(name, iteration=iteration, **kwargs)
        if self.max_to_keep is not None:
            self.checkpointer.prune(self.max_to_keep, iteration)

    def _end(self) -> NoReturn:
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


class EvaluationHook(hooks.EvalHook):
    """Evaluates every so many iterations and after the last; keeps the best checkpoint.

    Detectron2's ``EvalHook`` and ``BestCheckpointer`` in one, for a run that may end at any moment.
    A run is resumed from a checkpoint that was written before the evaluation of the same
    iteration: ``last_evaluation.json`` tells whether all that follows from the evaluation was
    done, and a resumed run makes up for it where it was not. The random numbers that an evaluation
    draws are none of training's. An evaluation before the last that finds no finite prediction in
    an image is left out with a warning, and not made up for.

    Attributes:
        best: the best checkpoint, in the main process; None where none is kept.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict[str, Any]],
        *,
        output_dir: str,
        best: BestCheckpoint | None,
        end_run: Callable[[], NoReturn],
        patience: int | None = None,
        end_early: Callable[[], NoReturn] | None = None,
    ):
        """
        Args:
            period: in iterations; 0: after the last one only.
            evaluate: returns nested metrics, and raises ``InterruptedEvaluation`` when the run is
                to end.
            output_dir: of the record; the main process alone reads and writes it.
            best: told of every evaluation, in the main process; None: no best checkpoint is kept.
            end_run: called where an evaluation before the last step's is interrupted; writes a
                checkpoint and raises ``InterruptedRun``.
            patience: so many evaluations in a row without a new best one end the run; None: never.
            end_early: called then; writes the last checkpoint and raises ``StoppedEarly``.
        """
        super().__init__(period, evaluate)
        self._patience = patience
        self._end_early = end_early
        self._record = Path(output_dir, "last_evaluation.json")
        self.best = best if comm.is_main_process() else None
        self._end_run = end_run

    def before_train(self) -> None:
        """Make up for the evaluation of the last step, if it is owed."""
        start = self.trainer.start_iter
        if self.best is not None and start > 0:
            self.best.restore()
        owed = comm.is_main_process() and self._is_due(start) and self._last_recorded() != start
        if any(comm.all_gather(owed)):
            logger.info("making up for the evaluation after %d iterations", start)
            with _as_after_last_step(self.trainer):
                self._do_eval()
        if comm.is_main_process() and start == 0:
            self._record.unlink(missing_ok=True)  # of another run
        self._note(start)
        if self._is_enough(start):
            raise StoppedEarly(start)  # as before it was resumed: its last checkpoint is there

    def after_step(self) -> None:
        super().after_step()
        iterations = self.trainer.iter + 1
        self._note(iterations)
        if self._is_enough(iterations):
            assert self._end_early is not None
            self._end_early()

    def _is_enough(self, iterations: int) -> bool:
        """Whether the best evaluation is too many ago; the same answer in all processes."""
        if self._patience is None or not self._is_due(iterations):
            return False
        enough = False
        if self.best is not None and self.best.iteration is not None:
            # Of a resumed run as well: the best one's iteration is kept beside its checkpoint.
            since = (iterations - 1 - self.best.iteration) // self._period
            enough = since >= self._patience
            if enough:
                logger.info(
                    "%s has not got better in the last %d evaluations: the run ends early",
                    self.best.metric,
                    since,
                )
        return any(comm.all_gather(enough))

    def _is_due(self, iterations: int) -> bool:
        """Whether an evaluation belongs to so many iterations, the end of the run apart."""
        end = self.trainer.max_iter
        return self._period > 0 and iterations % self._period == 0 and 0 < iterations < end

    def _do_eval(self) -> None:
        try:
            with preserved_random_state():
                super()._do_eval()
        except InterruptedEvaluation:
            logger.warning("the evaluation is cut short; --resume makes up for it")
            if self.trainer.iter >= self.trainer.max_iter:  # the last checkpoint is there
                raise InterruptedRun from None
            self._end_run()
        except NonFinitePredictionError as error:
            if self.trainer.iter >= self.trainer.max_iter:  # these are the weights of the run
                raise
            # Training may survive what made them so, and counts the steps that it leaves out.
            logger.warning("the evaluation is left out: %s", error)
            return
        if self.best is not None:
            self.best.update(
                self.trainer.storage.latest(),
                self.trainer.evaluated_weights,
                max_iter=self.trainer.max_iter,
            )

    def _last_recorded(self) -> int | None:
        try:
            return int(parse_json(self._record.read_bytes())["iterations"])
        except (OSError, OverflowError, ValueError, KeyError, TypeError):
            return None

    def _note(self, iterations: int) -> None:
        """Record that all that follows from the evaluation after so many iterations is done."""
        if comm.is_main_process() and self._is_due(iterations):
            _write_json(self._record, {"iterations": iterations})


class BestCheckpoint:
    """The checkpoint with the best value of a metric, kept across interruptions.

    The best value stands in a file beside the checkpoint that has it, written after it. The
    checkpoint is for use: it has the weights that were evaluated, and says which they are, but
    nothing to resume a run from.

    Attributes:
        metric: what decides.
        value, iteration: the best value so far and when it was; None before the first.
        weights: "plain" or "averaged", the weights that had it.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        metric: str,
        *,
        mode: str,
        averaged: nn.Module | None = None,
    ):
        """
        Args:
            checkpointer: writes ``model_best.pth`` into its folder.
            metric: as Detectron2 names it, such as "bbox/AP".
            mode: "max" or "min".
            averaged: the model with averaged weights, of a run that has them.
        """
        self.metric = metric
        self.value: float | None = None
        self.iteration: int | None = None
        self.weights: str | None = None
        self._checkpointer = checkpointer
        self._models = {"plain": checkpointer.model, "averaged": averaged}
        self._is_better = {"max": operator.gt, "min": operator.lt}[mode]
        self._path = Path(checkpointer.save_dir, f"{BEST_CHECKPOINT}.json")

    def restore(self) -> None:
        """Go on with the best value of the run that is resumed, where it had the same metric."""
        if not self._path.is_file():
            return
        try:
            record = parse_json(self._path.read_bytes())
            if record["metric"] == self.metric:
                self.value, self.iteration = float(record["value"]), int(record["iteration"])
                self.weights = record.get("weights")
        except (ValueError, KeyError, TypeError, OverflowError):
            logger.warning("%s is damaged: the best value is sought anew", self._path)

    def update(
        self, latest: Mapping[str, tuple[float, int]], weights: str = "plain", *, max_iter: int
    ) -> None:
        """Write a checkpoint if the metric is better than ever; NaN and infinity never are.

        Args:
            latest: of an ``EventStorage``: metric -> (value, iteration).
            weights: those that were evaluated, "plain" or "averaged".
            max_iter: iterations of the whole run.
        """
        if self.metric not in latest:
            logger.warning(
                "the evaluation has no metric %s: no best checkpoint is kept by it", self.metric
            )
            return
        value, iteration = latest[self.metric]
        done = iterations_done(iteration, max_iter)
        is_better = self.value is None or self._is_better(value, self.value)
        if not (math.isfinite(value) and is_better):
            logger.info(
                "%s is %.5g after %d iterations (%s weights), not better than the best so far (%s)",
                self.metric,
                value,
                done,
                weights,
                "none" if self.value is None else f"{self.value:.5g}",
            )
            return
        logger.info(
            "%s is %.5g after %d iterations (%s weights), the best so far",
            self.metric,
            value,
            done,
            weights,
        )
        model = self._models[weights]
        assert model is not None, f"a run without {weights} weights"
        facts = {"metric": self.metric, "value": value, "iteration": iteration, "weights": weights}
        self._checkpointer.save_weights(BEST_CHECKPOINT, model, **facts)
        self.value, self.iteration, self.weights = value, iteration, weights
        _write_json(self._path, facts)


def iterations_done(iteration: int, max_iter: int) -> int:
    """How many iterations were done when an evaluation was recorded under this number.

    That is the number of the iteration before it, the first being 0; at the end of the run it is
    ``max_iter``.
    """
    return min(iteration + 1, max_iter)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content))
