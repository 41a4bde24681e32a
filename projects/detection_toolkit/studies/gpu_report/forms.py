"""The forms of computing that are compared, and how a detector is put into one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from ...modeling import Execution
from ...modeling.execution import PLAIN

__all__ = [
    "COMPILED",
    "FORMS",
    "INFERENCE_ONLY",
    "NEEDS_GPU",
    "execution",
    "possible_forms",
    "put_into_form",
    "tf32",
]

# Beside the default values of Execution.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "plain": PLAIN,
    "gather": {"sampling": "gather"},
    "triton": {"sampling": "triton"},
    "recorded": {"sampling": "triton", "cuda_graphs": True},
    "compiled": {"sampling": "gather", "compile": "default"},
    "compiled, CUDA graphs": {"sampling": "gather", "compile": "reduce-overhead"},
}
NEEDS_GPU = frozenset({"triton", "recorded", "compiled, CUDA graphs"})
COMPILED = frozenset(name for name, values in FORMS.items() if values.get("compile"))
INFERENCE_ONLY = frozenset({"recorded"})


def possible_forms(forms: Iterable[str], *, on_gpu: bool, training: bool = False) -> list[str]:
    """Those that the device has; those that are compiled, which takes long, are asked for apart."""
    left_out = COMPILED | (frozenset() if on_gpu else NEEDS_GPU)
    left_out |= INFERENCE_ONLY if training else frozenset()
    return [form for form in forms if form not in left_out]


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
