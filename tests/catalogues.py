"""What leaves no trace of the data sets that a test registers."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def no_trace(tmp_path_factory, monkeypatch):
    """Forget data sets that the test registers; caches in the home folder are temporary."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
