import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection_toolkit.modeling.sampling import SamplingPoints, sample_features
from maps import make_maps
from stageinteractor import SubBoxSampling
from stageinteractor.boxes import box_to_xyzr
from stageinteractor.sampling import level_weights

STRIDES = (4, 8, 16, 32)


def make_sampling(channels=16, groups=2, base_points=3, sub_points=4, seed=0):
    torch.manual_seed(seed)
    sampling = SubBoxSampling(
        channels, groups=groups, base_points=base_points, sub_points=sub_points
    ).double()
    for parameter in sampling.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return sampling


def make_inputs(batch=2, num_queries=3, channels=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, num_queries, channels, generator=generator, dtype=torch.float64)
    top_left = torch.rand(batch, num_queries, 2, generator=generator, dtype=torch.float64) * 60
    size = 8 + torch.rand(batch, num_queries, 2, generator=generator, dtype=torch.float64) * 40
    xyzr = box_to_xyzr(torch.cat([top_left, top_left + size], -1))
    features = [
        torch.randn(batch, channels, 64 // s, 96 // s, generator=generator, dtype=torch.float64)
        for s in STRIDES
    ]
    return queries, xyzr, features


def bilinear(feature, x, y):
    """Value of a (C, H, W) map at cell coordinates (x, y), zero outside."""
    height, width = feature.shape[1:]
    x0, y0 = math.floor(x), math.floor(y)
    value = torch.zeros(len(feature), dtype=feature.dtype)
    for col, wx in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
        for row, wy in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
            if 0 <= col < width and 0 <= row < height:
                value += wx * wy * feature[:, row, col]
    return value


def test_points_follow_the_formula_one_by_one():
    sampling = make_sampling()
    queries, xyzr, _ = make_inputs()
    points = sampling.points(queries, xyzr)
    assert points.xy.shape == (2, 3, 2, 12, 2)
    assert points.z.shape == (2, 3, 2, 12)
    base = sampling.base_offset(queries).view(2, 3, 2, 3, 3)
    sub = sampling.sub_offset(queries).view(2, 3, 4, 3)
    for b, n, g, p, s in [(0, 0, 0, 0, 0), (1, 2, 1, 2, 3), (0, 1, 1, 0, 2)]:
        x, y, z, r = xyzr[b, n]
        dx0, dy0, dz0 = base[b, n, g, p]
        dx1, dy1, dz1 = sub[b, n, s]
        expected = torch.stack(
            [
                x + 2 ** (z - r / 2) * (dx0 + 2**dz0 * dx1),
                y + 2 ** (z + r / 2) * (dy0 + 2**dz0 * dy1),
            ]
        )
        torch.testing.assert_close(points.xy[b, n, g, p * 4 + s], expected)
        torch.testing.assert_close(points.z[b, n, g, p * 4 + s], z + dz0 + dz1)


def test_features_agree_with_a_loop_over_points_and_levels():
    sampling = make_sampling()
    queries, xyzr, features = make_inputs()
    points = sampling.points(queries, xyzr)
    weights = level_weights(points.z, (3, 4, 5, 6))
    sampled = sampling(queries, xyzr, make_maps(features, STRIDES))
    assert sampled.shape == (2, 3, 2, 12, 8)
    for b, n, g, p in [(0, 0, 0, 0), (1, 2, 1, 11), (1, 0, 0, 5), (0, 2, 1, 7)]:
        x, y = points.xy[b, n, g, p].tolist()
        expected = sum(
            weights[b, n, g, p, level]
            * bilinear(features[level][b, g * 8 : (g + 1) * 8], x / s - 0.5, y / s - 0.5)
            for level, s in enumerate(STRIDES)
        )
        torch.testing.assert_close(sampled[b, n, g, p], expected)


@settings(deadline=None)
@given(st.floats(-2, 12))
def test_level_weights_sum_to_one_and_peak_at_the_nearest_level(z):
    weights = level_weights(torch.tensor([z], dtype=torch.float64), (3, 4, 5, 6))[0]
    assert weights.sum().item() == pytest.approx(1.0)
    nearest = min(range(4), key=lambda level: abs(z - 3 - level))
    assert weights[nearest] == weights.max()


def test_a_point_outside_of_the_image_samples_zero():
    points = SamplingPoints(torch.full((1, 1, 1, 1, 2), -100.0), torch.full((1, 1, 1, 1), 3.0))
    features = [torch.ones(1, 4, 8, 8), torch.ones(1, 4, 4, 4)]
    weights = level_weights(points.z, (3, 4))
    sampled = sample_features(make_maps(features, (4, 8)), points.xy, weights)
    assert torch.equal(sampled, torch.zeros(1, 1, 1, 1, 4))


def test_sets_of_queries_share_the_maps_of_their_image():
    sampling = make_sampling()
    queries, xyzr, features = make_inputs(batch=6)
    features = [feature[:2].requires_grad_() for feature in features]
    together = sampling(queries, xyzr, make_maps(features, STRIDES))
    repeated = make_maps([x.repeat_interleave(3, dim=0) for x in features], STRIDES)
    torch.testing.assert_close(together, sampling(queries, xyzr, repeated))
    gradients = torch.autograd.grad(together.square().sum(), features)
    expected = torch.autograd.grad(sampling(queries, xyzr, repeated).square().sum(), features)
    for gradient, other in zip(gradients, expected):
        torch.testing.assert_close(gradient, other)
    with pytest.raises(ValueError, match="6 sets of queries .* maps of 4 images"):
        sampling(queries, xyzr, make_maps([x.repeat(2, 1, 1, 1) for x in features], STRIDES))


def test_gradients_agree_with_finite_differences():
    sampling = make_sampling(channels=8, groups=2, base_points=1, sub_points=2)
    queries, xyzr, features = make_inputs(batch=1, num_queries=2, channels=8)
    features = [f[:, :, :3, :4].contiguous().requires_grad_() for f in features[:2]]
    queries.requires_grad_()

    def run(queries, *features):
        return sampling(queries, xyzr, make_maps(features, (4, 8)))

    assert torch.autograd.gradcheck(run, (queries, *features))


def test_channels_that_do_not_split_into_groups_are_refused():
    with pytest.raises(ValueError, match="10 channels cannot be split into 4 groups"):
        SubBoxSampling(10, groups=4, base_points=1, sub_points=1)
