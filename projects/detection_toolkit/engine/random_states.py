"""The state of every random generator that a step of training may draw from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = [
    "capture_random_state",
    "is_random_state",
    "preserved_random_state",
    "restore_random_state",
]


def capture_random_state() -> dict[str, Any]:
    """States of Python, NumPy, PyTorch, and of this process's GPU where one is in use.

    Tensors and plain values only, as a checkpoint is read without running code.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def is_random_state(state: Any) -> bool:
    """Whether a checkpoint's copy can be put back; what runs today is left as it is."""
    with preserved_random_state():
        try:
            restore_random_state(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
    return True


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`capture_random_state` returned, or a checkpoint's copy of it."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, numpy_gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """What happens within draws random numbers that training does not miss."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)
