from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "tests" / "data"


@pytest.fixture
def edited_case(tmp_path):
    """Write a case of tests/data with some arrays replaced, or removed (None); return its path."""

    def write(name: str, **changes) -> Path:
        with np.load(DATA / f"{name}.npz") as archive:
            arrays = {key: archive[key] for key in archive.files}
        for key, change in changes.items():
            key = key.replace("__", "/")
            if change is None:
                del arrays[key]
            else:
                arrays[key] = change(arrays.get(key)) if callable(change) else change
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)
        return path

    return write
