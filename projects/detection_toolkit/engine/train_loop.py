"""One training step: forward, backward, accumulation, mixed precision, clipping."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import NonFinitePredictionError, UserError
from ..modeling import QueryDetector
from .bad_batch import as_json, write_bad_batch
from .device_scalars import DeviceScalars
from .precision import autocast_dtype

__all__ = ["DetectionTrainLoop", "DivergedError"]

logger = logging.getLogger(__name__)

_STAGE_LOSS = re.compile(r"(loss_(\w+))_stage(\d+)")
# Batches of skipped steps that a run writes down; the one that it stops at comes on top.
_MAX_WRITTEN = 3


class DivergedError(UserError, FloatingPointError):
    """More steps in a row than allowed had losses or gradients that are not finite."""


class _UnusableStep(Exception):
    """A step whose losses or gradients are not finite, in this process or another."""

    def __init__(
        self,
        reason: str,
        images: list[dict[str, Any]],
        losses: Mapping[str, float] | None = None,
        cause: FloatingPointError | None = None,
    ):
        super().__init__(reason)
        self.reason = reason
        self.images = images
        self.losses = losses or {}
        self.cause = cause


def _unusable_elsewhere(processes: list[int]) -> _UnusableStep:
    numbers = ", ".join(map(str, processes))
    return _UnusableStep(f"the step cannot be used in process {numbers}", [])


def _put(values: Mapping[str, float], iteration: int) -> None:
    get_event_storage().put_scalars(cur_iter=iteration, **values)


def _put_losses(values: Mapping[str, float], iteration: int) -> None:
    """Losses under their names for the console; each stage's own beside."""
    sums: dict[str, float] = {}
    for name, value in values.items():
        match = _STAGE_LOSS.fullmatch(name)
        if match is not None:
            name, kind, stage = match.groups()
            _put({f"stage{stage}/{kind}": value}, iteration)
        sums[name] = sums.get(name, 0.0) + value
    _put({"total_loss": sum(values.values()), **sums}, iteration)


class DetectionTrainLoop(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with mixed precision, gradient clipping and accumulation.

    With k accumulated batches, a ``QueryDetector`` first counts the targets of all k in a forward
    pass without gradient, so that the losses are normalised over the effective batch: k batches of
    B images give the gradients of one batch of k B images.

    A step waits for a GPU twice: where the matcher needs its costs, and before the update, where
    losses and gradient must be finite. With several processes it also waits for the others, before
    the backward pass. Losses and the like are read when they are to be logged, those of all steps
    since the last time at once.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        device: str,
        accumulation_steps: int = 1,
        precision: str | None = None,
        clip_norm: float | None = None,
        clip_norm_type: float = 2.0,
        max_skipped_steps: int = 0,
        output_dir: str = "",
        log_period: int = 1,
    ):
        """
        Args:
            model, data_loader, optimizer: see ``SimpleTrainer``.
            device: "cuda" or "cpu"; what autocast is told.
            accumulation_steps: k >= 1.
            precision: "float16" (with loss scaling, CUDA only), "bfloat16", or None.
            clip_norm: largest norm of the gradient; None: no clipping.
            clip_norm_type: p of the norm.
            max_skipped_steps: so many steps in a row may be left out, as their losses or gradients
                are not finite.
            output_dir: where such a batch is written to, in ``bad_batch/``.
            log_period: steps from one time that scalars are put into the event storage to the
                next; see :meth:`write_scalars`.

        Raises:
            UserError: an unknown precision, or float16 on a CPU.
        """
        super().__init__(model, data_loader, optimizer)
        device_type = torch.device(device).type
        self.accumulation_steps = accumulation_steps
        self.max_skipped_steps = max_skipped_steps
        self.clip_norm = clip_norm
        self.clip_norm_type = clip_norm_type
        self.output_dir = output_dir
        self.log_period = log_period
        self.device_type = device_type
        self.autocast_dtype = None if precision is None else autocast_dtype(precision, device)
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=precision == "float16")
        self._scalars = DeviceScalars()
        self._last_losses: dict[str, Tensor] = {}
        self._skipped_in_a_row = 0
        self._skipped = 0

    def run_step(self) -> None:
        """Draw the batches of one step, compute gradients, update the weights.

        A step whose loss, gradient, or what the matcher sees, is not finite is left out in all
        processes, up to ``max_skipped_steps`` in a row. Overflows of float16 are such steps; they
        lower the loss scale.

        Raises:
            DivergedError: it was one too many. The weights are those before the step;
                ``output_dir/bad_batch`` has the images, the losses and the weights.
        """
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.accumulation_steps)]
        data_time = time.perf_counter() - start
        random_state = torch.get_rng_state()

        self.optimizer.zero_grad()
        try:
            try:
                losses, of_batches = self._accumulate_gradients(batches)
            except _UnusableStep:
                self._lower_loss_scale()
                raise
            self.after_backward()
            self._update(batches, losses, of_batches, data_time)
        except _UnusableStep as step:
            # An exception that is caught keeps the graph alive; what is needed of it is this.
            problem = step
        else:
            self._skipped_in_a_row = 0
            problem = None
        if problem is not None:
            self._skip(problem, batches, random_state)
        if (self.iter + 1) % self.log_period == 0:
            self.write_scalars()

    def write_scalars(self, *, alone: bool = False) -> None:
        """Put the scalars of all steps since the last time into the event storage.

        Each has the iteration that it is of. A run calls it before it ends; otherwise it happens
        every ``log_period`` steps. With several processes, they exchange what they have.

        Args:
            alone: the other processes may not be there any more: this one's numbers have to do.
        """
        self._scalars.flush(alone=alone)

    def _update(
        self,
        batches: list[list[dict[str, Any]]],
        losses: dict[str, Tensor],
        of_batches: list[dict[str, Tensor]],
        data_time: float,
    ) -> None:
        """Clip the gradients and let the optimiser use them, if they and the losses are finite.

        Args:
            batches: of the step.
            losses: of the whole step.
            of_batches: of each batch.
            data_time: seconds that this process has waited for the batches.
        """
        self.grad_scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(
            [p for group in self.optimizer.param_groups for p in group["params"]],
            math.inf if self.clip_norm is None else self.clip_norm,
            norm_type=self.clip_norm_type,
        )
        try:
            norm_value = self._check_losses(batches, of_batches, norm)
        except _UnusableStep:
            # The scaler may have seen a gradient that is finite. It forgets it, at the same scale.
            if self.grad_scaler.is_enabled():
                self.grad_scaler.update(self.grad_scaler.get_scale())
            self._lower_loss_scale()
            raise
        self._write_losses(losses, data_time)
        get_event_storage().put_scalar("grad_norm", norm_value)
        is_finite = math.isfinite(norm_value)
        if is_finite or self.grad_scaler.is_enabled():
            self.grad_scaler.step(self.optimizer)  # does nothing after an overflow
            self.grad_scaler.update()
        if not is_finite:
            # Gradients are those of all processes, so that all of them come here.
            images = [image for batch in batches for image in batch]
            values = {name: float(value) for name, value in losses.items()}
            raise _UnusableStep(f"the norm of the gradient is {norm_value}", images, values)

    def _check_losses(
        self,
        batches: list[list[dict[str, Any]]],
        of_batches: list[dict[str, Tensor]],
        norm: Tensor,
    ) -> float:
        """The norm of the gradient as a number, read together with the losses.

        Raises:
            _UnusableStep: a loss is not finite, in this process or another.
        """
        totals = torch.stack([sum(losses.values()) for losses in of_batches]).double()
        checked = [totals, norm.double().reshape(1)]
        if comm.get_world_size() > 1:
            flags = totals.new_zeros(comm.get_world_size())
            flags[comm.get_rank()] = (~torch.isfinite(totals).all()).double()
            dist.all_reduce(flags)
            checked.append(flags)
        numbers = torch.cat(checked).tolist()  # the one time that the host waits here
        for batch, losses, total in zip(batches, of_batches, numbers):
            if not math.isfinite(total):
                values = {name: float(value) for name, value in losses.items()}
                raise _UnusableStep(f"the loss is {total}", batch, values)
        processes = [i for i, flag in enumerate(numbers[len(totals) + 1 :]) if flag]
        if processes:
            raise _unusable_elsewhere(processes)
        return numbers[len(totals)]

    def _lower_loss_scale(self) -> None:
        """What the scaler does after a gradient that overflows, where there is no gradient.

        It would not hear of a loss that is not finite, or of predictions, and go on as before. All
        processes come here together.
        """
        if not self.grad_scaler.is_enabled():
            return
        self.optimizer.zero_grad()
        parameter = next(
            p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad
        )
        self.grad_scaler.scale(torch.zeros((), device=parameter.device))  # it may be the first step
        parameter.grad = torch.full_like(parameter, math.inf)
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)  # does nothing but note it
        self.grad_scaler.update()

    def _accumulate_gradients(
        self, batches: list[list[dict[str, Any]]]
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Gradients of the whole step into ``.grad``; returns its losses, and each batch's."""
        kwargs, weight = self._normalisation(batches)
        sums: dict[str, Tensor] = {}
        of_batches = []
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with self._no_sync(enabled=not is_last):
                losses, problem = self._try(self.model, batch, **kwargs)
                self._agree(problem)
                self._note_accuracy()
                with self._products_of_backward():
                    self.grad_scaler.scale(sum(losses.values()) * weight).backward()
            of_batches.append({name: value.detach() for name, value in losses.items()})
            for name, value in of_batches[-1].items():
                sums[name] = sums.get(name, 0.0) + value * weight
        return sums, of_batches

    def _products_of_backward(self) -> contextlib.AbstractContextManager[None]:
        module = self._module
        if not isinstance(module, QueryDetector):
            return contextlib.nullcontext()
        return module.products_of_backward()

    def _note_accuracy(self) -> None:
        """The share of matched queries whose class is right, of this process."""
        module = self._module
        if not isinstance(module, QueryDetector) or not comm.is_main_process():
            return
        accuracy = module.matched_accuracy
        if accuracy is not None:
            names = [f"stage{t}/matched_accuracy" for t in range(len(accuracy))]
            self._scalars.add(names, accuracy, iteration=self.iter, write=_put)

    def _agree(self, problem: _UnusableStep | None) -> None:
        """Raise in all processes if there is a problem in any of them: none must wait for it."""
        processes = []
        if comm.get_world_size() > 1:
            device = next(self.model.parameters()).device
            flags = torch.zeros(comm.get_world_size(), device=device)
            flags[comm.get_rank()] = float(problem is not None)
            dist.all_reduce(flags)
            processes = flags.nonzero().flatten().tolist()
        if problem is not None:
            raise problem
        if processes:
            raise _unusable_elsewhere(processes)

    def _normalisation(self, batches: list[list[dict[str, Any]]]) -> tuple[dict, float]:
        if len(batches) == 1:
            return {}, 1.0
        module = self._module
        if not isinstance(module, QueryDetector):
            # A model that normalises by itself: the mean over the batches.
            return {}, 1.0 / len(batches)
        # Counted with the random numbers that the losses will be computed with.
        devices = [torch.cuda.current_device()] if self.device_type == "cuda" else []
        with torch.random.fork_rng(devices):
            counts = 0
            for batch in batches:
                count, problem = self._try(module.count_targets, batch)
                if problem is not None:
                    break
                counts = counts + count
        self._agree(problem)
        return {"target_counts": counts}, 1.0

    def _try(
        self, function: Callable[..., Any], batch: list[dict[str, Any]], **kwargs: Any
    ) -> tuple[Any, _UnusableStep | None]:
        """A forward pass of the model, in the type of mixed precision; or why there is none."""
        enabled = self.autocast_dtype is not None
        try:
            with torch.autocast(self.device_type, dtype=self.autocast_dtype, enabled=enabled):
                return function(batch, **kwargs), None
        except FloatingPointError as error:
            return None, _UnusableStep(str(error), batch, cause=error)

    @property
    def _module(self) -> nn.Module:
        return self.model.module if self._is_distributed else self.model

    @property
    def _is_distributed(self) -> bool:
        return isinstance(self.model, DistributedDataParallel)

    def _no_sync(self, *, enabled: bool):
        if enabled and self._is_distributed:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _write_losses(self, losses: Mapping[str, Tensor], data_time: float) -> None:
        """Sums over stages under the names that the console shows, each stage's own beside.

        All are means over the processes, which are the losses of the whole batch, and the longest
        wait for data.
        """
        self._last_losses = losses
        get_event_storage().put_scalar("rank_data_time", data_time)
        is_main = comm.is_main_process()
        add = partial(self._scalars.add, iteration=self.iter)
        values = torch.stack(list(losses.values()))
        seconds = values.new_full((1,), data_time, dtype=torch.double)
        add(list(losses), values, write=_put_losses if is_main else None, reduction="mean")
        add(["data_time"], seconds, write=_put if is_main else None, reduction="max")

    def _skip(
        self,
        problem: _UnusableStep,
        batches: list[list[dict[str, Any]]],
        random_state: Tensor,
    ) -> None:
        """Count a step that is left out, write its images down, and raise if it is one too many."""
        self.optimizer.zero_grad()
        self._skipped += 1
        self._skipped_in_a_row += 1
        stops = self._skipped_in_a_row > self.max_skipped_steps
        is_overflow = self.grad_scaler.is_enabled() and problem.cause is None
        get_event_storage().put_scalar("skipped_steps", self._skipped, smoothing_hint=False)
        place = f"iteration {self.iter}"
        path = None
        # What only another process can describe is not described here.
        if problem.images and (stops or self._is_worth_writing(is_overflow)):
            path = self._write_bad_batch(problem, batches, random_state, with_weights=stops)
        if not stops:
            names = ", ".join(str(x.get("file_name", "?")) for x in problem.images[:4])
            logger.warning(
                "%s is left out (%d of up to %d in a row): %s%s",
                place,
                self._skipped_in_a_row,
                self.max_skipped_steps,
                problem.reason,
                f"; images {names}{', ...' if len(problem.images) > 4 else ''}" if names else "",
            )
            return
        message = f"training stopped at {place}, before its update: {problem.reason}"
        if self.max_skipped_steps:
            message += f", after {self.max_skipped_steps} steps in a row that were left out"
        if path is not None:
            message += (
                f" ({path.with_suffix('.json')} lists the images of the batch and the losses of "
                f"every stage; tools/replay_batch.py {path} tries it again)"
            )
        if problem.cause is None:  # the matcher's own message says what to do
            message += (
                ". Lower optimizer.lr, set train.clip_grad.enabled=true, or train.amp.enabled=false"
            )
        raise DivergedError(message) from problem.cause

    def _is_worth_writing(self, is_overflow: bool) -> bool:
        """The first of a row, unless it is a usual overflow, and not without end."""
        if is_overflow or self._skipped_in_a_row > 1:
            return False
        written = Path(self.output_dir, "bad_batch").glob(f"*_rank{comm.get_rank()}.json")
        return len(list(written)) < _MAX_WRITTEN

    def _write_bad_batch(
        self,
        problem: _UnusableStep,
        batches: list[list[dict[str, Any]]],
        random_state: Tensor,
        *,
        with_weights: bool,
    ) -> Path:
        cause, images = problem.cause, problem.images
        where = cause.where if isinstance(cause, NonFinitePredictionError) else ()
        report = {
            "iteration": self.iter,
            "reason": problem.reason,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images": [
                {"file_name": str(x.get("file_name", "")), "image_id": x.get("image_id")}
                for x in images
            ],
            "losses": as_json(problem.losses),
            # With predictions that are not finite, there are no losses of this batch.
            "losses_of_the_step_before": as_json(
                {name: float(value) for name, value in self._last_losses.items()}
            ),
            "non_finite_predictions": [
                {"stage": stage, "file_name": str(images[image].get("file_name", ""))}
                for stage, image in where
            ],
        }
        module = self._module
        stem = Path(self.output_dir, "bad_batch", f"iter{self.iter:07d}_rank{comm.get_rank()}")
        return write_bad_batch(
            stem,
            report,
            batches,
            random_state=random_state,
            model=module if with_weights else None,
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["skipped_steps"] = (self._skipped, self._skipped_in_a_row)
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._skipped, self._skipped_in_a_row = state_dict.get("skipped_steps", (0, 0))
        if "grad_scaler" in state_dict and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
