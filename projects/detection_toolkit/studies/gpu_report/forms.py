"""The forms of computing that are compared, and how a detector is put into one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from ...modeling import Execution

__all__ = ["FORMS", "NEEDS_GPU", "execution", "put_into_form", "tf32"]

# Beside the default values of Execution.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"sampling": "grid", "mixing": "direct", "channels_last": False},
    "gather": {},
    "triton": {"sampling": "triton"},
    "compiled": {"compile": "default"},
    "CUDA graphs": {"compile": "reduce-overhead"},
}
NEEDS_GPU = frozenset({"triton", "CUDA graphs"})


def execution(form: str) -> Execution:
    """The form as a value."""
    return Execution(**FORMS[form])


def put_into_form(cfg: DictConfig, form: str) -> None:
    """Let the detector of a config compute in this form."""
    values = execution(form)
    cfg.model.execution.update(
        {name: getattr(values, name) for name in cfg.model.execution if hasattr(values, name)}
    )


@contextlib.contextmanager
def tf32(*, enabled: bool) -> Iterator[None]:
    """Let products and convolutions round float32 to TF32 on a GPU, or forbid it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
