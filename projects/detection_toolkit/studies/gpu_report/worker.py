"""The process that runs the stages, and writes each row down as soon as it is there."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...durable import open_log
from .context import Context
from .plan import GpuPlan
from .stages import STAGES, seconds_of

__all__ = ["work"]


def work(
    plan: GpuPlan,
    stages: Sequence[str],
    *,
    seconds: float,
    device: str,
    folder: Path,
    events: Path,
    to_plain: Callable[[nn.Module], nn.Module],
) -> int:
    """Run stages one after another.

    Args:
        plan: what to do in them.
        stages: their names.
        seconds: that all may take together.
        device: cpu, cuda, cuda:1.
        folder: for what they write.
        events: a file to which a line of JSON is added for every begin, row and end.
        to_plain: see :class:`~.context.Context`.

    Returns:
        the exit code: 0, or 1 after an error that leaves the process unfit for further stages.
    """
    # Timings look for garbage before each call; what is there by now is none, and takes long.
    gc.collect()
    gc.freeze()
    end = time.monotonic() + seconds
    for i, name in enumerate(stages):
        _tell(events, event="begin", stage=name)
        where = folder / name
        where.mkdir(parents=True, exist_ok=True)
        now = time.monotonic()
        deadline = now + seconds_of(name, stages[i:], end - now)
        context = Context(plan, torch.device(device), where, to_plain, deadline)
        try:
            for row in STAGES[name].run(context):
                _tell(events, event="row", stage=name, row=dataclasses.asdict(row))
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            _tell(events, event="end", stage=name, status="failed", reason=reason)
            return 1
        _tell(events, event="end", stage=name, status="done", reason="")
    return 0


def _tell(events: Path, **content: Any) -> None:
    with open_log(events) as file:
        file.write(json.dumps(_plain(content)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    """What JSON has a form for: numbers that are not finite become texts."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
