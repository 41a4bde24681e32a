"""One training step: forward, backward, accumulation, mixed precision, clipping."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["DetectionTrainLoop"]

_STAGE_LOSS = re.compile(r"(loss_(\w+))_stage(\d+)")
_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class DetectionTrainLoop(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with mixed precision, gradient clipping and accumulation.

    With k accumulated batches, a model that offers ``count_targets`` first counts the targets of
    all k in a forward pass without gradient, so that the losses are normalised over the effective
    batch: k batches of B images give the gradients of one batch of k B images.
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
        output_dir: str = "",
    ):
        """
        Args:
            model, data_loader, optimizer: see ``SimpleTrainer``.
            device: "cuda" or "cpu"; what autocast is told.
            accumulation_steps: k.
            precision: "float16" (with loss scaling, CUDA only), "bfloat16", or None.
            clip_norm: largest norm of the gradient; None: no clipping.
            clip_norm_type: p of the norm.
            output_dir: where a batch with a non-finite loss is described.

        Raises:
            ValueError: an unknown precision, float16 on a CPU, or k < 1.
        """
        super().__init__(model, data_loader, optimizer)
        if accumulation_steps < 1:
            raise ValueError(f"train.accumulation_steps must be >= 1, got {accumulation_steps}")
        if precision is not None and precision not in _PRECISIONS:
            raise ValueError(
                f"train.amp.precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}"
            )
        device_type = torch.device(device).type
        if precision == "float16" and device_type != "cuda":
            raise ValueError(
                "train.amp.precision=float16 needs a GPU; use train.amp.precision=bfloat16 on "
                f"{device_type}"
            )
        self.accumulation_steps = accumulation_steps
        self.clip_norm = clip_norm
        self.clip_norm_type = clip_norm_type
        self.output_dir = output_dir
        self.device_type = device_type
        self.autocast_dtype = _PRECISIONS.get(precision)
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=precision == "float16")
        self._last_losses: dict[str, float] = {}

    def run_step(self) -> None:
        """Draw the batches of one step, compute gradients, update the weights.

        Raises:
            FloatingPointError: the loss, the gradient, or what the matcher sees, is not finite.
                The weights are those before the step; ``output_dir/bad_batch`` describes the
                images. A gradient that overflows float16 is no error: the step is left out and the
                loss scale lowered.
        """
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.accumulation_steps)]
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        losses = self._accumulate_gradients(batches)
        self.after_backward()
        self._write_losses(losses, data_time)

        self.grad_scaler.unscale_(self.optimizer)
        norm = float(
            nn.utils.clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]],
                math.inf if self.clip_norm is None else self.clip_norm,
                norm_type=self.clip_norm_type,
            )
        )
        get_event_storage().put_scalar("grad_norm", norm)
        if not math.isfinite(norm) and not self.grad_scaler.is_enabled():
            images = [image for batch in batches for image in batch]
            self._stop(f"the norm of the gradient is {norm}", images, self._last_losses)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _accumulate_gradients(self, batches: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """Gradients of the whole step into ``.grad``; returns the summed losses."""
        kwargs, weight = self._normalisation(batches)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with self._no_sync(enabled=not is_last):
                losses = self._call(self.model, batch, **kwargs)
                total = sum(losses.values()) * weight
                if not torch.isfinite(total):
                    values = {k: float(v.detach()) for k, v in losses.items()}
                    self._stop(f"the loss is {float(total.detach())}", batch, values)
                self.grad_scaler.scale(total).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * weight
        return sums

    def _normalisation(self, batches: list[list[dict[str, Any]]]) -> tuple[dict, float]:
        if len(batches) == 1:
            return {}, 1.0
        module = self.model.module if self._is_distributed else self.model
        if not hasattr(module, "count_targets"):
            # A model that normalises by itself: the mean over the batches.
            return {}, 1.0 / len(batches)
        # Counted with the random numbers that the losses will be computed with.
        devices = [torch.cuda.current_device()] if self.device_type == "cuda" else []
        with torch.random.fork_rng(devices):
            counts = sum(self._call(module.count_targets, batch) for batch in batches)
        return {"target_counts": counts}, 1.0

    def _call(self, function: Callable[..., Any], batch: list[dict[str, Any]], **kwargs: Any):
        """A forward pass of the model, in the type of mixed precision."""
        enabled = self.autocast_dtype is not None
        try:
            with torch.autocast(self.device_type, dtype=self.autocast_dtype, enabled=enabled):
                return function(batch, **kwargs)
        except FloatingPointError as error:
            self._stop(str(error), batch, {}, error)

    @property
    def _is_distributed(self) -> bool:
        return isinstance(self.model, DistributedDataParallel)

    def _no_sync(self, *, enabled: bool):
        if enabled and self._is_distributed:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _write_losses(self, losses: Mapping[str, Tensor], data_time: float) -> None:
        """Sums over stages under the names that the console shows, each stage's own beside.

        All are means over the processes, which are the losses of the whole batch.
        """
        names = list(losses)
        values = torch.stack([losses[name] for name in names]).tolist()  # one transfer from a GPU
        self._last_losses = dict(zip(names, values))
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time)
        gathered = comm.gather((values, data_time))
        if not comm.is_main_process():
            return
        storage.put_scalar("data_time", max(seconds for _, seconds in gathered))
        means = [sum(column) / len(gathered) for column in zip(*(v for v, _ in gathered))]
        sums: dict[str, float] = {}
        for name, value in zip(names, means):
            match = _STAGE_LOSS.fullmatch(name)
            if match is not None:
                name, kind, stage = match.groups()
                storage.put_scalar(f"stage{stage}/{kind}", value)
            sums[name] = sums.get(name, 0.0) + value
        storage.put_scalars(**{"total_loss": sum(means), **sums})

    def _stop(
        self,
        reason: str,
        images: list[dict[str, Any]],
        losses: Mapping[str, float],
        cause: FloatingPointError | None = None,
    ) -> NoReturn:
        """Describe the offending images in a file, and raise."""
        folder = Path(self.output_dir, "bad_batch")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"iter{self.iter:07d}_rank{comm.get_rank()}.json"
        where = getattr(cause, "where", None)  # of the matcher's NonFinitePredictionError
        document = {
            "iteration": self.iter,
            "reason": reason,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images": [
                {"file_name": str(x.get("file_name", "")), "image_id": x.get("image_id")}
                for x in images
            ],
            "losses": _as_json(losses),
            # With predictions that are not finite, there are no losses of this batch.
            "losses_of_the_step_before": _as_json(self._last_losses),
            "non_finite_predictions": [
                {"stage": stage, "file_name": str(images[image].get("file_name", ""))}
                for stage, image in where or ()
            ],
        }
        path.write_text(json.dumps(document, indent=2, default=str), encoding="utf-8")
        message = (
            f"training stopped at iteration {self.iter}, before its update: {reason} ({path} lists "
            "the images of the batch and the losses of every stage)"
        )
        if cause is None:  # the matcher's own message says what to do
            message += (
                ". Lower optimizer.lr, set train.clip_grad.enabled=true, or train.amp.enabled=false"
            )
        raise FloatingPointError(message) from cause

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "grad_scaler" in state_dict and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _as_json(losses: Mapping[str, float]) -> dict[str, float | str]:
    # Numbers that are not finite as text: JSON has none.
    return {k: v if math.isfinite(v) else str(v) for k, v in losses.items()}
