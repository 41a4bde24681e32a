"""A detector with random weights, small and saved, for the demo to load."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from small_runs import draw_blocks, save_untrained_detector

from detection_toolkit.commands import predict

ROOT = Path(__file__).resolve().parents[2]


def _load_script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Loads a command-line script of the checkout as a module."""
    return _load_script


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    """Checkpoint of a tiny detector that was never trained, and so finds many things."""
    return save_untrained_detector(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    """What demo/demo.py calls."""
    return predict


@pytest.fixture()
def picture() -> np.ndarray:
    """(90, 120, 3) uint8: blocks on noise."""
    return draw_blocks()
