"""Compare the Triton kernels, interpreted on the CPU, with level-by-level bilinear sampling."""

from __future__ import annotations

import itertools

import torch
from tolerances import tolerance

from detection_toolkit.modeling import Execution, FeatureMaps
from detection_toolkit.modeling import feature_maps as module
from detection_toolkit.modeling.sampling import sample_features
from stageinteractor.sampling import level_weights

module.warn_without_triton = lambda device: True


def feature_maps(levels, fused):
    maps = FeatureMaps(tuple(levels), (4, 8), torch.tensor([[32, 48]] * len(levels[0])), (32, 48))
    return maps.laid_out(Execution(sampling="triton"), torch.float32) if fused else maps


def of_one_place(features, xy, z, shift):
    """The points of a stage, on all levels at the same place of the image."""
    return sample_features(features, xy + shift, level_weights(z + shift, (0, 1)))


def of_every_level(features, xy, z, shift):
    """Each level has points of its own, whose values are summed, as in deformable attention."""
    places = torch.stack([xy, xy.flip(-2)], dim=3) / 6 + shift  # (R B, N, G, L, P, 2)
    weights = torch.stack([z, z * shift], dim=3).flatten(3).softmax(-1).view(places.shape[:-1])
    x, y = places.movedim(3, 0).unbind(-1)
    return features.sample_sum(x, y, weights.movedim(3, 0))


torch.manual_seed(0)
compared = 0
shapes = ((2, 3, 5, 2, 7, 12), (1, 1, 3, 4, 5, 8))
for sample, half, in_order, shape in itertools.product(
    (of_one_place, of_every_level), (False, True), (False, True), shapes
):
    batch, sets, num_queries, groups, points, channels = shape
    torch.use_deterministic_algorithms(in_order)
    maps = [torch.randn(batch, groups * channels, h, w) for h, w in ((8, 12), (4, 6))]
    if half:
        maps = [level.bfloat16() for level in maps]
    xy = torch.rand(batch * sets, num_queries, groups, points, 2) * 70 - 10
    z = torch.randn(batch * sets, num_queries, groups, points)
    leaves = [x.requires_grad_() for x in (*maps, xy, z)]
    results = []
    for fused in (False, True):
        features = feature_maps(maps, fused)
        total = 0.0
        for shift in range(3):  # three stages look at the same maps
            values = sample(features, xy, z, shift)
            total = total + values.square().sum()
        gradients = torch.autograd.grad(total, leaves, retain_graph=True)
        again = torch.autograd.grad(total, leaves)
        frozen = feature_maps([x.detach() for x in maps], fused)
        values_frozen = sample(frozen, xy, z, 1)
        points_only = torch.autograd.grad(values_frozen.square().sum(), leaves[2:3])
        results.append((values, values_frozen, *gradients, *again, *points_only, total))
    for ours, theirs in zip(results[1], results[0]):
        assert ours.dtype == theirs.dtype
        # Coordinates of some ten cells, so that weights lose as many units in the last place.
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, **tolerance(ours.dtype, scale, operations=100))
        compared += 1
print(compared, "comparisons")
