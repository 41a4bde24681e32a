"""The configs: released sizes and recipe, and a step of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from loaded_configs import empty_model, load_config
from small_runs import make_batch

from detection_toolkit.config import apply_overrides, find_config_file

FOLDER = Path(find_config_file("dino/dino_shapes_tiny.py")).parent
CONFIGS = sorted(path.name for path in FOLDER.glob("*.py"))
RELEASED = [name for name in CONFIGS if "e.py" in name]
SMALL = [
    "model.num_classes=6",
    "model.backbone.out_channels=32",
    "model.backbone.norm_groups=8",
    "model.initial_queries.num_queries=7",
    "model.encoder.num_layers=1",
    "model.encoder.ffn_channels=16",
    "model.encoder.num_heads=4",
    "model.decoder.num_stages=2",
    "model.decoder.ffn_channels=16",
    "model.decoder.num_heads=4",
]


def load(name: str):
    return load_config(f"dino/{name}")


def test_names_say_whether_labels_come_across_stages():
    for name in CONFIGS:
        assigner = str(load(name).model.criterion.main.label_assigner._target_)
        assert ("cross_stage" in name) == ("CrossStageMatcher" in assigner), name
        for branch in ("encoder", "denoising"):
            losses = load(name).model.criterion.get(branch)
            if losses is not None:
                assert "StagewiseMatcher" in str(losses.label_assigner._target_)


@pytest.mark.parametrize("name", RELEASED)
def test_the_recipe_is_the_released_one(name):
    config = load(name)
    if "pretrained" in config.model.backbone.bottom_up:
        pytest.skip("an example, and timm is optional")
    model = empty_model(f"dino/{name}")
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for parameter, tensor in model.named_parameters():
        if tensor.requires_grad:
            expected = 1e-5 if parameter.startswith("backbone.bottom_up.") else 1e-4
            assert rates[id(tensor)] == pytest.approx(expected), parameter
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    assert config.dataloader.train.total_batch_size == 16
    assert not config.dataloader.train.dataset.filter_empty
    assert config.train.clip_grad.enabled and config.train.clip_grad.max_norm == 0.1
    epochs = int(name.removesuffix("e.py").rpartition("_")[2])
    assert config.train.max_iter * 16 // 118_287 == epochs
    drop = {12: 11, 24: 20, 36: 30, 50: 40}[epochs] / epochs
    factor_at = instantiate(config.lr_multiplier)
    for share, factor in ((0.0, 1.0), (drop - 1e-3, 1.0), (drop + 1e-3, 0.1), (1.0, 0.1)):
        assert factor_at(share) == pytest.approx(factor)
    criteria = [config.model.criterion[x] for x in config.model.criterion if x != "_target_"]
    for losses in criteria:
        weights = losses.class_weight, losses.l1_weight, losses.giou_weight
        assert weights == (1.0, 5.0, 2.0)
        costs = losses.matcher
        assert (costs.class_weight, costs.l1_weight, costs.giou_weight) == (2.0, 5.0, 2.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_reaches_every_parameter(name):
    torch.manual_seed(0)
    config = apply_overrides(load(name), SMALL)
    tiny = load("dino_shapes_tiny.py").model.backbone
    if name in RELEASED:
        config.model.backbone.bottom_up = tiny.bottom_up
        config.model.backbone.in_features = tiny.in_features
    if "5scale" in name:
        config.model.backbone.in_features = ["res2", "res3", "res4", "res5"]
    model = instantiate(config.model).train()
    losses = model(make_batch([2, 0]))
    assert len(losses) == 3 * (2 * 2 + ("dn_deformable" not in name))
    sum(losses.values()).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), parameter
    with torch.no_grad():
        for detections in model.eval()(make_batch([1, 1])):
            assert len(detections["instances"]) == min(42, config.model.max_detections)
