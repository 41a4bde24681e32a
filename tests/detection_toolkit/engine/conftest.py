"""A detector that was never trained, saved, and a picture for it."""

from __future__ import annotations

import numpy as np
import pytest
from small_runs import draw_blocks, save_untrained_detector


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    """Checkpoint of a tiny detector that was never trained, and so finds many things."""
    return save_untrained_detector(tmp_path_factory.mktemp("weights"))


@pytest.fixture()
def picture() -> np.ndarray:
    """(90, 120, 3) uint8: blocks on noise."""
    return draw_blocks()
