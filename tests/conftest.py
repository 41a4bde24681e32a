"""What all tests share: the same examples in every run, and no files outside temporary folders."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True, database=None)
settings.load_profile("repository")

# One process builds many detectors, some of a gigabyte: what they free goes back to the system.
# 128 KiB is glibc's own value; a value makes detection_toolkit.memory leave things as they are.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(128 * 2**10))

# Detectron2 and the built-in data set look at this variable, the former on import, so it is set
# here, before any test is collected. Worker processes of pytest-xdist inherit it: what one of them
# generates, the others find.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _IS_WORKER:
    os.environ["DETECTRON2_DATASETS"] = tempfile.mkdtemp(prefix="stageinteractor-tests-")

# A worker has close to a million objects when it has collected the tests. Python looks through them
# for cycles again and again: here not while modules are imported, never through what these have
# left, and less often (its own value is 700).
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 10)
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not _IS_WORKER:
        shutil.rmtree(os.environ["DETECTRON2_DATASETS"], ignore_errors=True)
