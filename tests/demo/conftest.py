"""A detector with random weights, small and saved, for the demo to load."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.config import instantiate

from detection_toolkit.config import get_config
from detection_toolkit.engine.shipped import shipped_config

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
    torch.manual_seed(0)
    model = instantiate(get_config(shipped_config()).model)
    for stage in model.decoder.stages:
        torch.nn.init.zeros_(stage.class_tower.out.bias)  # scores around one half
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    """demo/demo.py."""
    return _load_script("demo/demo.py")


@pytest.fixture()
def picture() -> np.ndarray:
    """(90, 120, 3) uint8: blocks on noise."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 80, (90, 120, 3), dtype=np.uint8)
    image[20:60, 30:70] = (40, 200, 220)
    image[50:80, 80:110] = (230, 60, 90)
    return image
