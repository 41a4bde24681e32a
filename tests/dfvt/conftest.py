from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from dfvt_cases import DATA, MINI

from dfvt import DFvTBackbone, DFvTClassifier

CLASSIFIER_ONLY = {"norm.weight", "norm.bias", "head.weight", "head.bias"}


@pytest.fixture
def mini_backbone() -> DFvTBackbone:
    torch.manual_seed(0)
    return DFvTBackbone(**MINI, drop_path_rate=0.0)


@pytest.fixture
def mini_classifier() -> DFvTClassifier:
    torch.manual_seed(0)
    return DFvTClassifier(**MINI, num_classes=10)


@pytest.fixture(scope="session")
def official_union() -> dict[str, torch.Tensor]:
    """Official weights of the small network: classifier's and detection backbone's together."""
    with np.load(DATA / "weights_mini.npz") as archive:
        assert json.loads(bytes(archive["config_json"]))["embed_dim"] == MINI["embed_dim"]
        weights = {k[2:]: torch.from_numpy(archive[k]) for k in archive.files if k[:2] == "w/"}
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def _only_in_backbone(name: str) -> bool:
    return name.split(".")[0] in ("norm0", "norm1", "norm2", "norm3", "conv1x1layers")


@pytest.fixture
def official_classifier(official_union) -> dict[str, torch.Tensor]:
    return {k: v for k, v in official_union.items() if not _only_in_backbone(k)}


@pytest.fixture
def official_backbone(official_union) -> dict[str, torch.Tensor]:
    return {k: v for k, v in official_union.items() if k not in CLASSIFIER_ONLY}
