"""Every parameter of both detectors starts from the distribution that the papers' code draws it
from: exact constants exactly, random ones by a Kolmogorov-Smirnov test."""

from __future__ import annotations

import math
import re

import pytest
import torch
from detectron2.layers import ShapeSpec
from scipy.stats import kstest, norm, uniform
from torch import nn

from adamixer import AdaMixerDecoder
from detection_toolkit.modeling import SharedNormChannelMapper
from stageinteractor import InitialQueries, StageInteractorDecoder

CHANNELS, GROUPS, CLASSES = 64, 4, 5


def xavier(tensor):
    fan_out, fan_in = tensor.shape[0], tensor[0].numel()
    return uniform_within(math.sqrt(6 / (fan_in + fan_out)))


def uniform_within(bound):
    return uniform(loc=-bound, scale=2 * bound)


def default_bias(fan_in):
    return uniform_within(fan_in**-0.5)


SHARED_RULES = [
    (r"attention\.tau", uniform(loc=0, scale=4)),
    (r"attention\.attention\.in_proj_weight", xavier),
    (r"attention\.attention\.in_proj_bias", 0.0),
    (r"attention\.attention\.out_proj\.weight", xavier),
    (r"(.*\.)?norm\.weight", 1.0),
    (r"(.*\.)?norm\.bias", 0.0),
    (r"ffn\.linear[12]\.weight", xavier),
    (r"ffn\.linear1\.bias", default_bias(CHANNELS)),
    (r"ffn\.linear2\.bias", default_bias(2 * CHANNELS)),
    (r"(class|box)_tower\.hidden\.weight", xavier),
    (r"(class|box)_tower\.hidden\.bias", default_bias(CHANNELS)),
    (r"class_tower\.out\.weight", xavier),
    (r"class_tower\.out\.bias", -math.log(99)),
    (r"box_tower\.out\.(weight|bias)", 0.0),
    (r"mixing\.filter_generator\.weight", 0.0),
    (r"mixing\.filter_generator\.bias", default_bias(CHANNELS)),
    (r"mixing\.out_proj\.bias", default_bias(16 * CHANNELS)),
]
STAGE_INTERACTOR_RULES = [
    *SHARED_RULES,
    (r"attention\.attention\.out_proj\.bias", 0.0),
    (r"sampling\.(base|sub)_offset\.weight", 0.0),
    (r"sampling\.(base|sub)_offset\.bias", None),  # test_sub_box_offsets
    (r"mixing\.out_proj\.weight", 0.0),
    (r"mixing\.bias_generator\.weight", 0.0),
    (r"mixing\.bias_generator\.bias", default_bias(CHANNELS)),
    (r"mixing\.static_mixing\..*", 0.0),
    (r"mixing\.channel_adapter\.gates\..*", 0.0),
    (r"mixing\.channel_adapter\.bias\.weight", 0.0),
    (r"mixing\.channel_adapter\.bias\.bias", default_bias(CHANNELS)),
    (r"mixing\.spatial_adapter\..*", 0.0),
]
ADAMIXER_RULES = [
    *SHARED_RULES,
    (r"attention\.attention\.out_proj\.bias", default_bias(CHANNELS)),
    (r"sampling\.offset\.weight", 0.0),
    (r"sampling\.offset\.bias", None),  # test_adamixer_offsets
    (r"mixing\.out_proj\.weight", xavier),
]


def sizes():
    return dict(
        channels=CHANNELS, num_heads=8, ffn_channels=2 * CHANNELS, groups=GROUPS, out_points=16
    )


def stage_interactor_decoder():
    torch.manual_seed(0)
    return StageInteractorDecoder(
        CLASSES, first_base_points=8, base_points=4, sub_points=8, **sizes()
    )


def adamixer_decoder(points=32):
    torch.manual_seed(0)
    return AdaMixerDecoder(CLASSES, points=points, **sizes())


def assert_drawn_from(values: list[torch.Tensor], distribution) -> None:
    sample = torch.cat([v.detach().flatten() for v in values]).double().numpy()
    assert kstest(sample, distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("decoder", "rules"),
    [
        pytest.param(stage_interactor_decoder, STAGE_INTERACTOR_RULES, id="stageinteractor"),
        pytest.param(adamixer_decoder, ADAMIXER_RULES, id="adamixer"),
    ],
)
def test_every_decoder_parameter_follows_its_rule(decoder, rules):
    drawn = {}
    for name, parameter in decoder().named_parameters():
        short_name = re.sub(r"^stages\.\d+\.", "", name)
        matching = [rule for pattern, rule in rules if re.fullmatch(pattern, short_name)]
        assert len(matching) == 1, f"{name} follows {len(matching)} rules"
        rule = matching[0]
        if isinstance(rule, float):
            assert (parameter == rule).all(), f"{name} is not {rule} throughout"
        elif rule is not None:
            key = (short_name, tuple(parameter.shape))
            drawn.setdefault(key, (rule, []))[1].append(parameter)
    for (name, _), (rule, values) in drawn.items():
        distribution = xavier(values[0]) if rule is xavier else rule
        sample = torch.cat([v.detach().flatten() for v in values])
        result = kstest(sample.double().numpy(), distribution.cdf)
        assert result.pvalue > 1e-4, f"{name}: {result}"


def test_sub_box_offsets():
    stages = stage_interactor_decoder().stages
    base = [s.sampling.base_offset.bias.view(-1, 3) for s in stages]
    sub = [s.sampling.sub_offset.bias.view(-1, 3) for s in stages]
    assert_drawn_from([b[:, :2] for b in base], uniform_within(0.5))
    assert_drawn_from([s[1:, :2] for s in sub], uniform_within(0.5 / math.sqrt(2)))
    for offsets in [*base, *sub]:
        assert (offsets[:, 2] == 0).all()
    for offsets in sub:
        assert (offsets[0] == 0).all()


def test_adamixer_offsets():
    offsets = [s.sampling.offset.bias.view(-1, 3) for s in adamixer_decoder(32).stages]
    assert_drawn_from([o[:, :2] for o in offsets], uniform_within(0.5))
    assert all((o[:, 2] == -1).all() for o in offsets)


def test_adamixer_offsets_of_a_square_number_of_points_form_a_grid():
    for stage in adamixer_decoder(16).stages:
        offsets = stage.sampling.offset.bias.view(GROUPS, 16, 3)
        centers = [-0.375, -0.125, 0.125, 0.375]
        expected = {(x, y) for x in centers for y in centers}
        for group in offsets:
            assert {tuple(xy) for xy in group[:, :2].tolist()} == expected
        assert (offsets[..., 2] == -1).all()


def test_query_content_is_standard_normal():
    torch.manual_seed(0)
    assert_drawn_from([InitialQueries(100, 64).content.weight], norm())


def test_neck_projections_are_xavier_with_zero_bias():
    class Maps(nn.Module):
        size_divisibility = 32

        def output_shape(self):
            channels = zip("abcd", (64, 128, 256, 512), (4, 8, 16, 32))
            return {name: ShapeSpec(channels=c, stride=s) for name, c, s in channels}

    torch.manual_seed(0)
    neck = SharedNormChannelMapper(Maps(), list("abcd"), 64)
    for projection in neck.projections:
        assert_drawn_from([projection.weight], xavier(projection.weight))
        assert (projection.bias == 0).all()
    assert (neck.norm.weight == 1).all() and (neck.norm.bias == 0).all()


def test_every_class_starts_at_one_percent_on_average():
    decoder = stage_interactor_decoder()
    bias = decoder.stages[0].class_tower.out.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))
