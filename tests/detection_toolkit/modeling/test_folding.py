"""Convolutions that take a fixed norm into their weights compute what both compute in turn."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from torch import nn
from torch.nn import functional as F

from detection_toolkit.modeling.backbone import FrozenStatsBatchNorm2d
from detection_toolkit.modeling.folding import FoldedConv2d, fold_frozen_norms

NORMS = {"affine fixed": "FrozenBN", "affine trained": FrozenStatsBatchNorm2d}


def make_resnet(norm):
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(
            BottleneckBlock,
            2,
            stride_per_block=[2, 1],
            in_channels=channels,
            out_channels=2 * channels,
            bottleneck_channels=4,
            norm=norm,
        )
        for channels in (8, 16)
    ]
    resnet = ResNet(
        BasicStem(in_channels=3, out_channels=8, norm=norm), stages, out_features=["res2", "res3"]
    )
    generator = torch.Generator().manual_seed(1)
    for module in resnet.modules():
        if isinstance(module, (FrozenBatchNorm2d, FrozenStatsBatchNorm2d)):
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, name).data
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return resnet.double()


def outcome(resnet):
    """Maps, and gradients of all that is trained and of the image."""
    image = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(2)).double()
    maps = resnet(image.requires_grad_())
    sum(x.square().mean() for x in maps.values()).backward()
    gradients = {name: x.grad for name, x in resnet.named_parameters()}
    return maps, {**gradients, "image": image.grad}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_maps_and_gradients_are_equal(norm):
    plain = make_resnet(norm)
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    assert sum(isinstance(x, FoldedConv2d) for x in folded.modules()) == 1 + 2 * 7
    torch.testing.assert_close(outcome(folded), outcome(plain), rtol=1e-10, atol=1e-12)


def test_weights_and_their_names_stay_and_can_change_afterwards():
    plain, folded = make_resnet("FrozenBN"), make_resnet("FrozenBN")
    fold_frozen_norms(folded)
    assert list(folded.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for model in (plain, folded):
            model.stem.conv1.weight.mul_(2)
            model.stem.conv1.norm.running_mean.add_(1)
    image = torch.rand(1, 3, 32, 32).double()
    torch.testing.assert_close(folded(image), plain(image), rtol=1e-10, atol=1e-12)


def test_a_bias_and_an_activation_stay_what_they_are():
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(4).double()
    norm.weight.copy_(torch.rand(4) + 0.5)
    conv = Conv2d(3, 4, 3, groups=1, stride=2, norm=norm, activation=F.gelu).double()
    image = torch.rand(1, 3, 9, 9).double()
    before = conv(image)
    fold_frozen_norms(nn.Sequential(conv))
    torch.testing.assert_close(conv(image), before)


def test_norms_that_follow_the_batch_are_left_alone():
    convolutions = nn.Sequential(
        Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4)),
        Conv2d(4, 4, 1, norm=nn.GroupNorm(2, 4)),
        Conv2d(4, 4, 1),
    )
    fold_frozen_norms(convolutions)
    assert [type(x) for x in convolutions] == [Conv2d] * 3
