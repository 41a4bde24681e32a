"""AdaMixer's own parts against their equations, one query, group and point at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from adamixer import AdaMixerDecoder, AdaptiveMixing, AdaptiveSampling, refine_by_scale
from detection_toolkit.modeling import QUERY_HEADS
from detection_toolkit.structures import GroundTruth, Predictions
from detection_toolkit.training import Criterion, HungarianMatcher, StagewiseMatcher
from maps import make_maps
from stageinteractor import CascadeDynamicMixing, FilterBank, InitialQueries

CHANNELS, GROUPS, POINTS, STRIDES = 16, 2, 3, (4, 8, 16, 32)


def randomize(module):
    """Weights that are zero at the start would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def small_decoder(num_stages=2):
    return AdaMixerDecoder(
        3,
        num_stages=num_stages,
        channels=CHANNELS,
        num_heads=4,
        ffn_channels=24,
        groups=GROUPS,
        points=POINTS,
        out_points=4,
    )


def maps(batch=1):
    return [torch.randn(batch, CHANNELS, 96 // s, 64 // s, requires_grad=True) for s in STRIDES]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def bilinear(feature, x, y):
    """Value at continuous cell coordinates, cell centres at .5, zeros outside."""
    x, y = x - 0.5, y - 0.5
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < feature.shape[1] and 0 <= column < feature.shape[2]:
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                total = total + weight * feature[:, row, column]
    return total


@pytest.mark.parametrize("strides", [STRIDES, [2 * s for s in STRIDES], [4, 12, 40, 41]])
def test_sampling_matches_the_equations(strides):
    sampling = randomize(AdaptiveSampling(CHANNELS, groups=GROUPS, points=POINTS)).double()
    features = [m.detach().double() for m in maps()]
    queries = torch.randn(1, 2, CHANNELS, dtype=torch.double)
    xyzr = torch.tensor([[[30.0, 50.0, 4.0, 0.5], [10.0, 20.0, 5.5, -1.0]]], dtype=torch.double)
    sampled = sampling(queries, xyzr, make_maps(features, strides))
    per_group = CHANNELS // GROUPS
    for n in range(2):
        x, y, z, r = xyzr[0, n].tolist()
        offsets = sampling.offset(queries[0, n]).view(GROUPS, POINTS, 3)
        for g in range(GROUPS):
            for p in range(POINTS):
                dx, dy, dz = offsets[g, p].tolist()
                px, py = x + 2 ** (z - r / 2) * dx, y + 2 ** (z + r / 2) * dy
                logits = [-((z + dz - math.log2(s)) ** 2) / 2 for s in strides]
                weights = torch.tensor(logits, dtype=torch.double).softmax(0).tolist()
                channels = slice(g * per_group, (g + 1) * per_group)
                expected = sum(
                    w * bilinear(f[0, channels], px / s, py / s)
                    for w, f, s in zip(weights, features, strides)
                )
                expected = torch.zeros(per_group, dtype=torch.double) + expected
                torch.testing.assert_close(sampled[0, n, g, p], expected)


def test_mixing_matches_the_equations():
    mixing = randomize(AdaptiveMixing(CHANNELS, groups=GROUPS, points=POINTS, out_points=4))
    mixing.double()
    queries = torch.randn(1, 2, CHANNELS, dtype=torch.double)
    x = torch.randn(1, 2, GROUPS, POINTS, 8, dtype=torch.double)
    mixed, _ = mixing(queries, x, FilterBank())
    for n in range(2):
        numbers = mixing.filter_generator(queries[0, n]).view(GROUPS, -1)
        rows = []
        for g in range(GROUPS):
            channel = numbers[g, :64].view(8, 8)
            spatial = numbers[g, 64:].view(4, POINTS)
            y = F.layer_norm(x[0, n, g] @ channel, (POINTS, 8)).relu()
            rows.append(F.layer_norm(spatial @ y, (4, 8)).relu())
        expected = mixing.norm(queries[0, n] + mixing.out_proj(torch.stack(rows).flatten()))
        torch.testing.assert_close(mixed[0, n], expected)


def test_mixing_is_cascade_mixing_without_reuse_and_biases():
    mixing = randomize(AdaptiveMixing(CHANNELS, groups=GROUPS, points=POINTS, out_points=4))
    cascade = CascadeDynamicMixing(
        CHANNELS, groups=GROUPS, base_points=POINTS, sub_points=1, out_points=4, mix_bias=False
    )
    cascade.load_state_dict(mixing.state_dict())
    mixing.double(), cascade.double()
    queries = torch.randn(2, 5, CHANNELS, dtype=torch.double)
    x = torch.randn(2, 5, GROUPS, POINTS, 8, dtype=torch.double)
    expected, _ = cascade(queries, x, FilterBank())
    torch.testing.assert_close(mixing(queries, x, FilterBank())[0], expected)


def test_nothing_is_put_into_the_filter_bank():
    mixing = AdaptiveMixing(CHANNELS, groups=GROUPS, points=POINTS, out_points=4)
    bank = FilterBank()
    _, after = mixing(torch.randn(1, 2, CHANNELS), torch.randn(1, 2, GROUPS, POINTS, 8), bank)
    assert after is bank


def test_centres_move_by_the_scale_whatever_the_aspect_ratio():
    xyzr = torch.tensor([100.0, 50.0, 5.0, 3.0], dtype=torch.double)
    delta = torch.tensor([0.5, -0.25, 0.1, -0.2], dtype=torch.double)
    expected = torch.tensor([116.0, 42.0, 5.1, 2.8], dtype=torch.double)
    torch.testing.assert_close(refine_by_scale(xyzr, delta), expected)


def test_first_stage_refines_nothing_at_the_start():
    features = make_maps(maps(), STRIDES, [(90, 60)])
    queries = InitialQueries(5, CHANNELS)(features)
    output = small_decoder(1)(features, queries)[0]
    torch.testing.assert_close(output.queries.geometry, queries.geometry)


def test_every_parameter_and_map_has_a_gradient():
    initial_queries = InitialQueries(5, CHANNELS)
    decoder = randomize(small_decoder())
    features = maps(2)
    batch = make_maps(features, STRIDES, [(90, 60), (96, 64)])
    outputs = Predictions(decoder(batch, initial_queries(batch)))
    truth = GroundTruth.collate(
        [torch.tensor([[5.0, 5.0, 40.0, 60.0]]), torch.zeros(0, 4)],
        [torch.tensor([1]), torch.zeros(0, dtype=torch.long)],
        [(90, 60), (96, 64)],
    )
    criterion = Criterion(
        num_classes=3, matcher=HungarianMatcher(), label_assigner=StagewiseMatcher()
    )
    sum(criterion(outputs, truth).as_dict().values()).backward()
    for name, parameter in [*decoder.named_parameters(), *initial_queries.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(feature.grad.abs().sum() > 0 for feature in features)


def test_the_head_is_registered():
    assert QUERY_HEADS.get("AdaMixerDecoder") is AdaMixerDecoder


@pytest.mark.parametrize("sizes", [dict(num_stages=0), dict(channels=30), dict(groups=3)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    arguments = dict(channels=16, num_heads=4, ffn_channels=8, groups=2, points=3, out_points=4)
    with pytest.raises(ValueError, match=r"\d"):
        AdaMixerDecoder(3, **{**arguments, **sizes})
