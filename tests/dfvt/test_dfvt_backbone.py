"""The backbone as Detectron2 uses it, and the classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from detectron2.modeling.backbone import FPN, Backbone
from dfvt_cases import MINI
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

from dfvt import VARIANTS, DFvTBackbone, DFvTClassifier, add_dfvt_config

# Parameters: classifier, backbone, output convolutions of the backbone. As published.
SIZES = {
    "tiny": (3_967_627, 3_680_067, 96_768),
    "small": (11_225_485, 10_844_901, 387_072),
    "base": (37_331_136, 36_996_056, 688_128),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_number_of_parameters_is_the_published_one(variant):
    with torch.device("meta"):
        classifier = DFvTClassifier(**VARIANTS[variant])
        backbone = DFvTBackbone(**VARIANTS[variant])
    fuse = [m.fuse for m in backbone.outputs.values() if m.fuse is not None]
    assert (count(classifier), count(backbone), sum(map(count, fuse))) == SIZES[variant]


def test_is_a_registered_backbone(mini_backbone):
    assert BACKBONE_REGISTRY.get("DFvTBackbone") is DFvTBackbone
    assert isinstance(mini_backbone, Backbone)
    assert mini_backbone.size_divisibility == 32
    shapes = mini_backbone.output_shape()
    assert {k: (v.channels, v.stride) for k, v in shapes.items()} == {
        "res2": (32, 4),
        "res3": (64, 8),
        "res4": (128, 16),
        "res5": (256, 32),
    }


def yaml_config(name: str):
    cfg = get_cfg()
    add_dfvt_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    return cfg


def test_detectron2_builds_it_from_a_yaml_config():
    cfg = yaml_config("DFvTBackbone")
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert isinstance(backbone, DFvTBackbone)
    assert count(backbone) == SIZES["small"][1]
    cfg.merge_from_list(["MODEL.DFVT.EMBED_DIM", 48, "MODEL.DFVT.MLP_RATIO", 4.0])
    cfg.MODEL.BACKBONE.NAME = "build_dfvt_fpn_backbone"
    with torch.device("meta"):
        fpn = build_backbone(cfg)
    assert count(fpn.bottom_up) == SIZES["tiny"][1]
    assert list(fpn.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    with pytest.raises(ValueError, match="3 channels, not 1"):
        build_backbone(cfg, ShapeSpec(channels=1))


_SHARED = DFvTBackbone(**MINI).eval()


@settings(max_examples=5)
@given(st.integers(4, 80), st.integers(4, 80), st.integers(1, 2))
def test_any_size_is_padded_to_the_divisor(height, width, batch):
    torch.manual_seed(height * 100 + width)
    images = torch.randn(batch, 3, height, width)
    bottom, right = -height % 32, -width % 32
    with torch.no_grad():
        maps = _SHARED(images)
        padded = _SHARED(F.pad(images, (0, right, 0, bottom)))
    for name, spec in _SHARED.output_shape().items():
        size = (height + bottom) // spec.stride, (width + right) // spec.stride
        assert maps[name].shape == (batch, spec.channels, *size)
        assert torch.equal(maps[name], padded[name])
        assert torch.isfinite(maps[name]).all()


@pytest.mark.parametrize("size", [(3, 64), (64, 2)])
def test_images_below_the_stride_of_the_stem_are_refused(size, mini_backbone, mini_classifier):
    for network in (mini_backbone, mini_classifier):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels.*at least 4x4"):
            network(torch.zeros(1, 3, *size))


def test_images_of_a_batch_do_not_see_each_other(mini_backbone):
    mini_backbone.eval().double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        together = mini_backbone(images)
        alone = mini_backbone(images[1:])
    for name in together:
        torch.testing.assert_close(together[name][1:], alone[name])


def test_output_map_joins_context_then_local(mini_backbone):
    mini_backbone.eval().double()
    inputs = {}
    for name, output in mini_backbone.outputs.items():
        output.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
    with torch.no_grad():
        maps = mini_backbone(torch.randn(1, 3, 64, 64, dtype=torch.float64))
        for name, output in mini_backbone.outputs.items():
            context = output.norm(inputs[name].context).permute(0, 3, 1, 2)
            expected = context
            if name != "res5":
                context = context.repeat_interleave(2, 2).repeat_interleave(2, 3)
                weight = output.fuse.weight
                channels = context.shape[1]
                expected = F.conv2d(context, weight[:, :channels])
                expected = expected + F.conv2d(inputs[name].local, weight[:, channels:])
            torch.testing.assert_close(maps[name], expected)


def test_backbone_shifts_small_maps_and_the_classifier_does_not(mini_backbone, mini_classifier):
    images = torch.randn(1, 3, 64, 64)  # attention maps of 8, 4, 2, 2 tokens a side
    masks = {}
    for key, network in (("backbone", mini_backbone), ("classifier", mini_classifier)):
        masks[key] = []
        for stage in network.network.stages:
            for block in stage.blocks:
                block.attention.register_forward_pre_hook(
                    lambda _, args, key=key: masks[key].append(args[1] is not None)
                )
        with torch.no_grad():
            network.eval()(images)
    assert masks["backbone"] == [False, True] * 3 + [False]
    assert masks["classifier"] == [False, True] + [False] * 5


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing_but_memory(rate):
    results = {}
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        backbone = DFvTBackbone(**MINI, drop_path_rate=rate, use_checkpoint=use_checkpoint)
        backbone.double()
        calls = []
        blocks = [block for stage in backbone.network.stages for block in stage.blocks]
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
        sum(m.square().mean() for m in backbone(images).values()).backward()
        gradients = {k: p.grad for k, p in backbone.named_parameters()}
        results[use_checkpoint] = gradients, dict(backbone.named_buffers()), len(calls)
    plain, checkpointed = results[False], results[True]
    assert checkpointed[2] == 2 * plain[2]  # the blocks really ran again
    for before, after in zip(plain[:2], checkpointed[:2]):
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_every_parameter_learns_and_batch_norms_are_live(mini_backbone):
    before = {k: v.clone() for k, v in mini_backbone.named_buffers() if "running" in k}
    maps = mini_backbone(torch.randn(2, 3, 64, 64))
    sum((m * torch.randn_like(m)).sum() for m in maps.values()).backward()
    assert [k for k, p in mini_backbone.named_parameters() if p.grad is None] == []
    assert before
    for name, value in mini_backbone.named_buffers():
        if name in before:
            assert not torch.equal(value, before[name]), name


def test_train_and_eval_return_the_model(mini_backbone):
    assert mini_backbone.eval() is mini_backbone
    assert mini_backbone.train() is mini_backbone


def test_drop_path_rate_grows_linearly_over_the_blocks():
    network = DFvTBackbone(**MINI, drop_path_rate=0.12).network
    drops = [block.drop_path for stage in network.stages for block in stage.blocks]
    assert isinstance(drops[0], nn.Identity)
    assert all(isinstance(d, StochasticDepth) and d.mode == "row" for d in drops[1:])
    assert [d.p for d in drops[1:]] == pytest.approx([0.02 * k for k in range(1, 7)])


def test_initial_values_are_the_authors(mini_backbone):
    for name, module in mini_backbone.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.abs().max() < 2, name
            if module.weight.numel() > 1000:
                assert float(module.weight.std()) == pytest.approx(0.02, rel=0.15), name
            if module.bias is not None:
                assert not module.bias.any(), name
        elif isinstance(module, nn.Conv2d):
            if module.weight.numel() > 1000:
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                expected = (2 / fan_out) ** 0.5
                assert float(module.weight.std()) == pytest.approx(expected, rel=0.15), name
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all() and not module.bias.any(), name
        elif hasattr(module, "bias_table"):
            assert 0.01 < float(module.bias_table.std()) < 0.03, name
    stem = [mini_backbone.network.stem.conv1, mini_backbone.network.stem.conv2]
    assert all(conv.bias.any() for conv in stem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depths=(1, 1, 2)), r"depths=\[1, 1, 2\] must have 4 numbers"),
        (dict(num_heads=(2, 2)), "num_heads"),
        (dict(depths=(1, 0, 1, 1)), "a stage needs a block"),
        (dict(embed_dim=33), "embed_dim=33"),
        (dict(embed_dim=8), "at least 16"),
        (dict(num_heads=(5, 4, 4, 8)), "5 attention heads cannot share 32 channels"),
        (dict(window_size=0), "window_size=0 must be at least 1"),
        (dict(drop_path_rate=1.0), "drop_path_rate=1.0"),
        (dict(out_features=["res2", "p5"]), r"'p5'.*choose from res2, res3, res4, res5"),
        (dict(out_features=["res2"]), "res5 among them"),
    ],
)
def test_settings_that_make_no_network_are_refused(change, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        DFvTBackbone(**{**MINI, **change})


def test_some_maps_can_be_left_out():
    backbone = DFvTBackbone(**MINI, out_features=["res5", "res3"])
    maps = backbone(torch.randn(2, 3, 32, 64))
    assert list(maps) == list(backbone.output_shape()) == ["res3", "res5"]
    sum((m * torch.randn_like(m)).sum() for m in maps.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_feeds_an_fpn(mini_backbone):
    fpn = FPN(mini_backbone, ["res2", "res3", "res4", "res5"], 16).eval()
    assert fpn.size_divisibility == 32
    with torch.no_grad():
        maps = fpn(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[-2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_takes_bfloat16(mini_backbone):
    images = torch.randn(1, 3, 64, 64)
    mini_backbone.eval()
    with torch.no_grad():
        exact = mini_backbone(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = mini_backbone(images)
    for name, value in exact.items():
        error = (rough[name].float() - value).norm() / value.norm()
        assert 0 < error < 0.05, name


def test_classifier_takes_rectangles(mini_classifier):
    with torch.no_grad():
        logits = mini_classifier.eval()(torch.randn(2, 3, 64, 100))
    assert logits.shape == (2, 10)
