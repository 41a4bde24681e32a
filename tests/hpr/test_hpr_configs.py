"""The configs: the recipe as released, and a step of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from loaded_configs import build_empty, empty_model, load_config
from small_runs import make_batch

from detection_toolkit.config import apply_overrides, find_config_file

FOLDER = Path(find_config_file("hpr/hpr_shapes_tiny.py")).parent
# Those of the bases Align-DETR and DDQ have tests of their own.
OTHERS = ("hpr_align_detr", "hpr_ddq")
CONFIGS = sorted(x.name for x in FOLDER.glob("*.py") if not x.name.startswith(OTHERS))
EPOCH = 7330
# Iterations, those at which the rate drops, and whether images without objects are kept.
RELEASED = {
    "hpr_deformable_detr_r50_12e.py": (12 * EPOCH, [80_630], False),
    "hpr_deformable_detr_r50_24e.py": (24 * EPOCH, [117_280, 161_260], False),
    "hpr_deformable_detr_lsj_r50_12e.py": (88_000, [80_000], True),
    "hpr_dino_r50_12e.py": (12 * EPOCH, [80_630], False),
    "hpr_dino_r50_24e.py": (24 * EPOCH, [117_280, 161_260], False),
    "hpr_dino_swin_l_12e.py": (88_000, [80_000], False),
    "hpr_dino_swin_l_24e.py": (176_000, [117_300, 161_300], False),
    "hpr_dino_swin_l_36e.py": (264_000, [205_300, 249_300], False),
}
SMALL = [
    "model.num_classes=6",
    "model.backbone.out_channels=16",
    "model.backbone.norm_groups=8",
    "model.initial_queries.num_queries=7",
    "model.encoder.num_layers=1",
    "model.encoder.ffn_channels=16",
    "model.encoder.num_heads=4",
    "model.decoder.num_stages=2",
    "model.decoder.ffn_channels=16",
    "model.decoder.num_heads=4",
    "model.decoder.inner_channels=4",
]


def load(name: str):
    return load_config(f"hpr/{name}")


def test_every_released_config_of_these_bases_is_here():
    mine = {name for name in CONFIGS if name.startswith(("hpr_dino", "hpr_deformable"))}
    assert mine == set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_the_recipe_is_the_released_one(name):
    config, (iterations, drops, keeps_empty) = load(name), RELEASED[name]
    model = empty_model(f"hpr/{name}")
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for parameter, tensor in model.named_parameters():
        if tensor.requires_grad:
            expected = 1e-5 if parameter.startswith("backbone.bottom_up.") else 1e-4
            assert rates[id(tensor)] == pytest.approx(expected), parameter
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    assert config.dataloader.train.total_batch_size == 16
    assert config.dataloader.train.dataset.filter_empty != keeps_empty
    assert config.train.clip_grad.enabled and config.train.clip_grad.max_norm == 0.1
    assert config.train.max_iter == iterations
    factor_at = instantiate(config.lr_multiplier)
    for i, drop in enumerate([0, *drops]):
        assert factor_at((drop + 1) / iterations) == pytest.approx(0.1**i)
        if drop:
            assert factor_at((drop - 1) / iterations) == pytest.approx(0.1 ** (i - 1))
    sizes = model.decoder.num_stages, model.num_queries, len(model.encoder.layers)
    assert sizes == (6, 900, 6) and model.max_detections == 300
    assert config.model.pixel_std == [58.335, 57.12, 57.375]
    swin = "swin" in name
    roi = model.decoder.stages[0].roi_features
    assert roi.finest_scale == 56
    assert model.strides == ((4, 8, 16, 32) if swin else (8, 16, 32, 64))
    assert (roi.strides or model.strides) == (8, 16, 32, 64)
    assert (model.denoising is not None) == ("dino" in name)
    weights = {name: x.class_weight for name, x in model.criterion.branches.items()}
    assert weights.pop("regional") == weights.pop("dynamic") == 0.5
    assert weights.pop("encoder") == model.criterion.main.class_weight == 1.0
    assert weights == (
        {"denoising": 1.0, "regional_denoising": 0.5, "dynamic_denoising": 0.5}
        if "dino" in name
        else {}
    )
    for losses in (model.criterion.main, *model.criterion.branches.values()):
        terms = losses.l1_weight / losses.class_weight, losses.giou_weight / losses.class_weight
        assert terms == (5.0, 2.0)
        costs = losses.matcher
        assert (costs.class_weight, costs.l1_weight, costs.giou_weight) == (2.0, 5.0, 2.0)
        assert costs.class_cost.eps == 1e-12


def test_strides_of_swin_can_be_those_of_the_maps():
    config = apply_overrides(load("hpr_dino_swin_l_12e.py"), ["model.decoder.roi_strides=null"])
    model = build_empty(config)
    assert model.decoder.stages[0].roi_features.strides is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_reaches_every_parameter(name):
    torch.manual_seed(0)
    config = apply_overrides(load(name), SMALL)
    tiny = load("hpr_shapes_tiny.py").model.backbone
    if name in RELEASED:
        maps = list(tiny.in_features)
        config.model.backbone.bottom_up = tiny.bottom_up
        config.model.backbone.in_features = ["res2", *maps] if "swin" in name else maps
    model = instantiate(config.model).train()
    losses = model(make_batch([2, 0]))
    branches = 4 if config.model.denoising is None else 7
    assert len({key.rpartition("_stage")[0] for key in losses}) == 3 * branches
    sum(losses.values()).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), parameter
    with torch.no_grad():
        for detections in model.eval()(make_batch([1, 1])):
            assert len(detections["instances"]) == min(42, config.model.max_detections)
