"""The settings of a run, ``train.*`` of a config: every key, its default and its limits."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ..errors import UnknownNameError, UserError

__all__ = [
    "AmpSettings",
    "BestCheckpointSettings",
    "CheckpointSettings",
    "ClipGradSettings",
    "EarlyStoppingSettings",
    "EmaSettings",
    "RunSettings",
]

# A setting that may also be null.
_OPTIONAL = {"optional": True}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
}


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _default_ddp() -> dict[str, Any]:
    return {
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "fp16_compression": False,
    }


@dataclass(frozen=True)
class AmpSettings:
    """Mixed precision, ``train.amp``.

    Attributes:
        enabled: in training.
        evaluation: when evaluating; a choice of its own.
        precision: "float16" (GPU), or "bfloat16" (GPU or CPU).
    """

    enabled: bool = False
    evaluation: bool = False
    precision: str = "float16"


@dataclass(frozen=True)
class ClipGradSettings:
    """Clipping of the gradient, ``train.clip_grad``.

    Attributes:
        enabled: whether it is clipped.
        max_norm: the largest norm of all gradients together.
        norm_type: p of the norm.
    """

    enabled: bool = True
    max_norm: float = 1.0
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        _check(self.max_norm > 0, "train.clip_grad.max_norm must be > 0", self.max_norm)
        _check(self.norm_type > 0, "train.clip_grad.norm_type must be > 0", self.norm_type)


@dataclass(frozen=True)
class EmaSettings:
    """Exponential moving average of the weights, ``train.ema``.

    Attributes:
        enabled: keep it, and evaluate it.
        decay: what it keeps of itself per step.
        warmup: keep less in the beginning, (1 + n) / (10 + n) after n steps where that is below
            ``decay``, so that an average over a short run is not one of its first weights.
        compare: evaluate the plain weights as well; the better ones count.
    """

    enabled: bool = False
    decay: float = 0.9999
    warmup: bool = True
    compare: bool = True

    def __post_init__(self) -> None:
        _check(0.0 < self.decay < 1.0, "train.ema.decay must lie between 0 and 1", self.decay)


@dataclass(frozen=True)
class CheckpointSettings:
    """Periodic checkpoints, ``train.checkpointer``.

    Attributes:
        period: iterations from one to the next.
        max_to_keep: how many are kept, the newest; None: all.
    """

    period: int = 5000
    max_to_keep: int | None = field(default=5, metadata=_OPTIONAL)

    def __post_init__(self) -> None:
        _check(self.period >= 1, "train.checkpointer.period must be >= 1", self.period)
        keep = self.max_to_keep
        _check(keep is None or keep >= 1, "train.checkpointer.max_to_keep must be >= 1", keep)


@dataclass(frozen=True)
class BestCheckpointSettings:
    """The checkpoint of the best evaluation, ``train.best_checkpointer``.

    Attributes:
        enabled: whether there is one; it needs periodic evaluations.
        metric: what decides, as Detectron2 names it; of the first test set where there are
            several, unless it begins with another one's name.
        mode: "max" or "min", which of its values is the best.
    """

    enabled: bool = True
    metric: str = "bbox/AP"
    mode: str = "max"

    def __post_init__(self) -> None:
        allowed = self.mode in ("max", "min")
        _check(allowed, "train.best_checkpointer.mode must be max or min", self.mode)


@dataclass(frozen=True)
class EarlyStoppingSettings:
    """The end of a run that gets no better, ``train.early_stopping``.

    Attributes:
        enabled: whether it may end early; it needs periodic evaluations and a best checkpoint,
            whose metric decides.
        patience: it ends after so many evaluations in a row that are not the best.
    """

    enabled: bool = False
    patience: int = 5

    def __post_init__(self) -> None:
        _check(self.patience >= 1, "train.early_stopping.patience must be >= 1", self.patience)


@dataclass(frozen=True)
class RunSettings:
    """Everything about a run that is not model, data or optimiser: ``train`` of a config.

    A config holds them as plain keys, see :meth:`as_dict`; whoever needs one makes this of them
    with :meth:`from_config`.

    Attributes:
        output_dir: folder for all that the run writes.
        init_checkpoint: weights to begin with; "" or None: random ones.
        init_prefix: of the tensors to take from it in training, e.g. "backbone."; "": all.
        keep_known_classes: where ``init_checkpoint`` names its classes, give each class of the data
            what it has for the class of that name; those that are new begin as initialised. False:
            rows of classes are taken by their order, and not at all if their number differs.
        max_iter: iterations of the whole run.
        max_epochs: passes over the training set; sets max_iter, and evaluation and checkpoint
            periods with it, when the data are known. None: max_iter holds.
        freeze: names of parameters that are not trained, with * for any part of a name, as in
            "backbone.*".
        device: "cuda", "cuda:1", "cpu".
        seed: of initial weights, order and augmentation; negative: another one in every run.
        cudnn_benchmark: let cuDNN choose its algorithms by timing them.
        deterministic: bit for bit the same on a CPU, with the same number of threads; slower.
        amp: mixed precision.
        ddp: arguments of PyTorch's ``DistributedDataParallel``; any may be added.
        clip_grad: clipping of the gradient.
        max_skipped_steps: so many steps in a row may be left out, as their losses or gradients
            are not finite.
        allow_pickle: open ``init_checkpoint`` even where that runs code.
        allow_partial: evaluate, draw or export also where ``init_checkpoint`` does not give the
            model all of its weights. Training begins with what fits in any case.
        accumulation_steps: forward passes for one step of the optimiser.
        mix_until: share of the run after which mosaic, mixup and copy-paste end, and every image
            comes by itself. 1: never.
        ema: exponential moving average of the weights.
        reference_world_size: number of processes that batch, learning rate and schedule are meant
            for; when the run has another, they are scaled. 0: never.
        checkpointer: periodic checkpoints.
        best_checkpointer: the checkpoint of the best evaluation.
        early_stopping: the end of a run that gets no better.
        eval_period: iterations from one evaluation to the next; 0: only after the last.
        validation_loss: also compute the losses of every stage in each evaluation, from its own
            forward passes.
        stage_evaluation: also evaluate every stage (AP, fading and growing scores, duplicates,
            changing labels), after the last iteration and with --eval-only.
        log_period: iterations from one line of the log to the next.
        trackers: where scalars go besides the console and metrics.json: "tensorboard", "wandb",
            "mlflow", or nodes of :mod:`.trackers`.
    """

    output_dir: str = "./output"
    init_checkpoint: str | None = field(default="", metadata=_OPTIONAL)
    init_prefix: str = ""
    keep_known_classes: bool = True
    max_iter: int = 87960
    max_epochs: float | None = field(default=None, metadata={**_OPTIONAL, "kind": float})
    freeze: list[str] = field(default_factory=list)
    device: str = field(default_factory=_default_device)
    seed: int = -1
    cudnn_benchmark: bool = False
    deterministic: bool = False
    amp: AmpSettings = field(default_factory=AmpSettings)
    ddp: Mapping[str, Any] = field(default_factory=_default_ddp)
    clip_grad: ClipGradSettings = field(default_factory=ClipGradSettings)
    max_skipped_steps: int = 20
    allow_pickle: bool = False
    allow_partial: bool = False
    accumulation_steps: int = 1
    mix_until: float = 1.0
    ema: EmaSettings = field(default_factory=EmaSettings)
    reference_world_size: int = 0
    checkpointer: CheckpointSettings = field(default_factory=CheckpointSettings)
    best_checkpointer: BestCheckpointSettings = field(default_factory=BestCheckpointSettings)
    early_stopping: EarlyStoppingSettings = field(default_factory=EarlyStoppingSettings)
    eval_period: int = 5000
    validation_loss: bool = True
    stage_evaluation: bool = False
    log_period: int = 20
    trackers: list[Any] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        for name in ("max_iter", "accumulation_steps", "log_period"):
            value = getattr(self, name)
            _check(value >= 1, f"train.{name} must be >= 1", value)
        for name in ("max_skipped_steps", "reference_world_size"):
            value = getattr(self, name)
            _check(value >= 0, f"train.{name} must be >= 0", value)
        _check(
            bool(self.output_dir.strip()), "train.output_dir must name a folder", self.output_dir
        )
        try:
            torch.device(self.device)
        except RuntimeError as error:
            rule = "train.device must be a device of PyTorch, such as cpu, cuda or cuda:1"
            raise UserError(f"{rule}, got {self.device!r}") from error
        epochs = self.max_epochs
        _check(epochs is None or epochs > 0, "train.max_epochs must be > 0", epochs)
        _check(0 <= self.mix_until <= 1, "train.mix_until must be from 0 to 1", self.mix_until)
        are_names = all(isinstance(name, str) for name in self.freeze)
        _check(are_names, "train.freeze must be a list of names", self.freeze)
        if self.early_stopping.enabled:
            can = self.best_checkpointer.enabled and self.eval_period > 0
            needed = "needs train.best_checkpointer.enabled=true and train.eval_period > 0"
            _check(can, f"train.early_stopping {needed}", self.eval_period)

    @classmethod
    def from_config(cls, train: Mapping[str, Any] | DictConfig) -> RunSettings:
        """The settings of a config.

        Args:
            train: its node ``train``. What it lacks, as a config of an older version may, has its
                default.

        Raises:
            UserError: a value of a wrong kind, or out of its limits; names its key.
            UnknownNameError: a key that is no setting; names the nearest ones.
        """
        if isinstance(train, DictConfig):
            train = OmegaConf.to_container(train, resolve=True)
        return _filled(cls(), train, "train")

    def as_dict(self) -> dict[str, Any]:
        """As plain values and dicts, the form that a config has."""
        return dataclasses.asdict(self)

    @property
    def last_mixed_iteration(self) -> int:
        """Iterations before images come by themselves; see ``mix_until``."""
        return round(self.mix_until * self.max_iter)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"


def _check(holds: bool, rule: str, value: Any) -> None:
    if not holds:
        raise UserError(f"{rule}, got {value!r}")


def _filled(defaults: Any, given: Any, path: str) -> Any:
    """A dataclass of settings with the given values in the place of its defaults."""
    fields = {f.name: f for f in dataclasses.fields(defaults)}
    if not isinstance(given, Mapping):
        raise UserError(f"{path} is a group of keys ({', '.join(fields)}), got {given!r}")
    values = {}
    for name, value in given.items():
        key = f"{path}.{name}"
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=3, cutoff=0.5)
            keys = ", ".join(f"{path}.{n}" for n in near or fields)
            hint = f"the nearest keys are {keys}" if near else f"there are {keys}"
            raise UnknownNameError(f"{key} is no setting of a run; {hint}")
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            values[name] = _filled(default, value, key)
        elif isinstance(default, Mapping):
            _check(isinstance(value, Mapping), f"{key} must be a group of keys", value)
            values[name] = {**default, **value}
        elif value is not None or not fields[name].metadata.get("optional"):
            if isinstance(value, os.PathLike) and isinstance(default, str):
                value = os.fspath(value)
            _check_kind(value, fields[name].metadata.get("kind", type(default)), key)
            values[name] = value
        else:
            values[name] = None
    return dataclasses.replace(defaults, **values)


def _check_kind(value: Any, kind: type, key: str) -> None:
    # A whole number is a number, and true is neither.
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    _check(fits, f"{key} must be {_KINDS[kind]}", value)
