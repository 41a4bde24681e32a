"""Features of regions, the two auxiliary refiners, merges, the hybrid layer."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from hpr_models import make_model, small_config
from small_runs import make_batch
from tolerances import tolerance
from torch import Tensor, nn

from deformable_detr.heads import boxes_in_pixels
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import Execution, FeatureMaps
from hpr import (
    ChannelMerge,
    DynamicConvolution,
    FixedMerge,
    RegionalCrossAttention,
    RoIFeatures,
    ScalarMerge,
)
from hpr.roi import flat_maps

STRIDES = (4, 8, 16)
PLAIN = Execution(sampling="grid", mixing="direct")


def maps_of(images=2, channels=3, requires_grad=False) -> FeatureMaps:
    torch.manual_seed(0)
    levels = tuple(
        torch.randn(images, channels, -(-64 // s), -(-96 // s), dtype=torch.float64)
        for s in STRIDES
    )
    for level in levels:
        level.requires_grad_(requires_grad)
    sizes = torch.tensor([[64, 96]] * images)
    return FeatureMaps(levels, STRIDES, sizes, (64, 96))


def boxes_of(rows=2, count=30) -> Tensor:
    """Of all sizes, also beyond the images, on borders, and of no area."""
    torch.manual_seed(1)
    center = torch.rand(rows, count, 2, dtype=torch.float64) * torch.tensor([110.0, 80.0]) - 8
    size = 90 * torch.rand(rows, count, 2, dtype=torch.float64) ** 2
    size[:, 0] = 0
    size[:, 1, 0] = 0
    boxes = torch.cat([center - size / 2, center + size / 2], dim=-1)
    boxes[:, 2] = torch.tensor([0.0, 0, 96, 64])
    boxes[:, 3] = torch.tensor([200.0, 200, 220, 230])  # outside of everything
    return boxes


@pytest.mark.parametrize("strides", [None, [8, 16, 32]])
@pytest.mark.parametrize("rows", [2, 4])
def test_one_sum_over_rows_is_torchvisions_roi_align(strides, rows):
    """Values, and gradients of the maps; also of two sets of boxes for each image."""
    results = []
    for execution in (PLAIN, Execution()):
        maps = maps_of(requires_grad=True)
        module = RoIFeatures(finest_scale=8, strides=strides, execution=execution)
        boxes = boxes_of(rows)
        assert set(module.levels(boxes, 3).flatten().tolist()) == {0, 1, 2}
        features = module(boxes, maps)
        assert features.shape == (rows, 30, 49, 3)
        weight = torch.linspace(-1, 1, features.numel(), dtype=torch.float64)
        (features * weight.view_as(features)).sum().backward()
        results.append((features, [level.grad for level in maps.levels]))
    torch.testing.assert_close(results[0], results[1])
    assert not results[0][0][:, 3].any()


def test_it_is_detectron2s_pooler_where_sizes_are_far_from_a_threshold():
    maps = maps_of()
    boxes = boxes_of()[:, 4:].float().double()  # as Boxes keeps them
    pooler = ROIPooler(7, [1 / s for s in STRIDES], 2, "ROIAlignV2", 8, canonical_level=2)
    expected = pooler(list(maps.levels), [Boxes(x) for x in boxes])
    found = RoIFeatures(finest_scale=8)(boxes, flat_maps(maps, torch.float64))
    expected = expected.flatten(2).transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, expected)


def test_levels_change_at_doubled_sizes_and_a_little_earlier():
    module = RoIFeatures(finest_scale=56)

    def level(side: float) -> int:
        box = torch.tensor([[10.0, 10, 10 + side, 10 + side]], dtype=torch.float64)
        return int(module.levels(box, 4))

    for doubled, expected in ((112, 1), (224, 2), (448, 3)):
        assert level(doubled) == expected
        assert level(doubled - 5e-5) == expected  # 1e-6 within the logarithm
        assert level(doubled - 7e-5) == expected - 1
    assert (level(0), level(1), level(55), level(10_000)) == (0, 0, 0, 3)


def test_the_rule_is_not_detectron2s_just_below_a_threshold():
    boxes = [Boxes(torch.tensor([[0.0, 0, 111.99995, 111.99995]]))]
    theirs = assign_boxes_to_levels(boxes, 3, 6, 56, 3)
    assert int(theirs) == 0 and int(RoIFeatures().levels(boxes[0].tensor, 4)) == 1


def test_boxes_that_are_no_numbers_do_not_end_a_run():
    boxes = boxes_of()
    boxes[0, 5] = torch.nan
    boxes[1, 6, 2] = torch.inf
    features = RoIFeatures(finest_scale=8)(boxes, maps_of())
    clean = RoIFeatures(finest_scale=8)(boxes_of(), maps_of())
    assert not features[0, 5].isfinite().any()
    assert torch.equal(features[0, 7:], clean[0, 7:])


def test_senseless_regions_are_refused():
    with pytest.raises(UserError, match="finest_scale"):
        RoIFeatures(finest_scale=0)
    with pytest.raises(UserError, match="roi_strides has 2 strides, and there are 3 maps"):
        RoIFeatures(strides=[8, 16])(boxes_of(), maps_of())


def test_dynamic_convolution_filters_each_region_by_its_query():
    torch.manual_seed(0)
    module = DynamicConvolution(8, inner_channels=4).double()
    content = torch.randn(3, 8, dtype=torch.float64)
    regions = torch.randn(3, 49, 8, dtype=torch.float64)
    for i, found in enumerate(module(content, regions)):
        filters = module.filters(content[i])
        x = regions[i] @ filters[: 8 * 4].view(8, 4)
        x = module.norm1(x).relu() @ filters[8 * 4 :].view(4, 8)
        x = module.norm2(x).relu()
        expected = module.out_norm(module.out(x.reshape(49 * 8))).relu()
        torch.testing.assert_close(found, expected)


def test_regional_attention_of_samples_to_cells():
    """With keys and values written out, and without."""
    torch.manual_seed(0)
    module = RegionalCrossAttention(8, num_heads=2, num_samples=3).double()
    with torch.no_grad():
        module.attention.in_proj_bias.normal_()
        module.attention.out_proj.bias.normal_()
    content = torch.randn(4, 8, dtype=torch.float64)
    regions = torch.randn(4, 49, 8, dtype=torch.float64)
    results = []
    for execution in (PLAIN, Execution()):
        module.execution = execution
        module.zero_grad()
        inputs = [x.clone().requires_grad_() for x in (content, regions)]
        found = module(*inputs)
        found.square().sum().backward()
        gradients = [p.grad for p in module.parameters()] + [x.grad for x in inputs]
        results.append((found, gradients))
    torch.testing.assert_close(results[0], results[1])

    samples = module.samples(content).view(4, 3, 8)
    keys = regions + module.key_position
    expected = module.attention(samples, keys, regions)[0].reshape(4, 24)
    torch.testing.assert_close(found, module.out_norm(module.out(expected)).relu())
    # The code of cell (row 3, column 5), counted from 1: rows first.
    angle = torch.tensor([3.0, 5.0]) / (7 + 1e-6) * 2 * torch.pi
    expected = torch.cat([torch.stack([a.sin(), a.cos()]) for a in angle])
    code = module.key_position[2 * 7 + 4].view(2, 4)[:, :2].flatten().float()
    torch.testing.assert_close(code, expected)


def test_merges():
    features = torch.randn(3, 2, 5, 4).unbind()
    start = [1.0, 0.5, 2.0]
    expected = features[0] + 0.5 * features[1] + 2 * features[2]
    shapes = {}
    for kind in (ChannelMerge, ScalarMerge, FixedMerge):
        merge = kind(start, 4, 3)
        torch.testing.assert_close(merge(features), expected)
        shapes[kind] = [tuple(p.shape) for p in merge.parameters()]
    assert shapes == {ChannelMerge: [(4, 3)], ScalarMerge: [(3,)], FixedMerge: []}
    assert torch.equal(FixedMerge([1, 0, 0], 4, 3)(features), features[0])
    merge = ChannelMerge(start, 4, 3)
    with torch.no_grad():
        merge.weights[2, 1] = 7
    changed = merge(features)
    assert torch.equal(changed[..., :2], ChannelMerge(start, 4, 3)(features)[..., :2])
    torch.testing.assert_close(changed[..., 2], expected[..., 2] + 6.5 * features[1][..., 2])
    torch.manual_seed(0)
    drawn = ChannelMerge(None, 256, 3).weights.detach()
    assert drawn.abs().max() <= (6 / 259) ** 0.5 and drawn.std() == pytest.approx(0.0875, rel=0.1)


@pytest.mark.parametrize("merge", ["channel", "scalar", "fixed"])
def test_weights_for_another_number_of_refiners_are_refused(merge):
    with pytest.raises(UserError, match="merge_start must have 3 weights"):
        instantiate(small_config("model.decoder.merge_start=[1,1]", f"model.decoder.merge={merge}"))
    with pytest.raises(UserError, match="'channel', 'scalar', 'fixed'"):
        instantiate(small_config("model.decoder.merge=mean"))


def features_of(detector: nn.Module):
    """Maps of a batch whose second image is smaller, and placed queries."""
    batch = make_batch([1, 1])
    batch[1]["image"] = batch[1]["image"][:, :40, :56]
    maps = detector.extract_features(detector.preprocess_image(batch))
    queries = detector.initial_queries(maps)
    position = detector.decoder.position(queries.geometry, maps)
    return maps, queries._replace(position=position)


def test_a_hybrid_layer_step_by_step():
    detector = make_model()
    stage = detector.decoder.stages[0]
    maps, queries = features_of(detector)
    count = queries.content.shape[1]
    mask = torch.rand(count, count) < 0.3
    mask.fill_diagonal_(False)
    q, s, r = queries.content, queries.position, queries.geometry
    content, found = stage.refine(queries._replace(attention_mask=mask), maps)

    regions = RoIFeatures(finest_scale=28, execution=PLAIN)(
        boxes_in_pixels(r, maps.image_sizes), maps
    )
    dynamic, regional = stage.auxiliary["dynamic"], stage.auxiliary["regional"]

    def self_attention(part: nn.Module) -> Tensor:
        layer = part.self_attention.attention
        return q + layer(q + s, q + s, q, attn_mask=mask)[0]

    def ffn(part: nn.Module, x: Tensor) -> Tensor:
        return x + part.ffn.linear2(part.ffn.linear1(x).relu())

    def look(part: nn.Module, x: Tensor) -> Tensor:
        return part.look(x.flatten(0, 1), regions.flatten(0, 1)).view_as(x)

    a, d, c = (self_attention(part) for part in (stage, dynamic, regional))
    w = stage.merge_attended.weights
    x = stage.self_attention.norm(w[:, 0] * a + w[:, 1] * d + w[:, 2] * c)
    levels = r[:, :, None] * maps.valid_ratios.to(r)[:, None].repeat(1, 1, 1, 2)
    x = stage.norm(x + stage.attention(x + s, levels, maps))
    x = ffn(stage, x)
    refined = []
    for part, y in ((dynamic, d), (regional, c)):
        y = part.self_attention.norm(y)
        y = part.norm(y + look(part, y))
        refined.append(ffn(part, y))
    w = stage.merge_refined.weights
    expected = stage.ffn.norm(w[:, 0] * x + w[:, 1] * refined[0] + w[:, 2] * refined[1])
    torch.testing.assert_close(content, expected)
    torch.testing.assert_close(found["dynamic"], refined[0])
    torch.testing.assert_close(found["regional"], refined[1])


def test_auxiliary_refiners_know_nothing_of_the_primary_one():
    detector = make_model()
    stage = detector.decoder.stages[0]
    maps, queries = features_of(detector)
    _, before = stage.refine(queries, maps)
    with torch.no_grad():
        for part in (stage.self_attention, stage.attention, stage.ffn):
            for parameter in part.parameters():
                parameter.add_(0.1)
    _, after = stage.refine(queries, maps)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_references_have_no_gradient_by_regions():
    detector = make_model()
    stage = copy.deepcopy(detector.decoder.stages[0])
    maps, queries = features_of(detector)
    reference = queries.geometry.clone().requires_grad_()
    _, found = stage.refine(queries._replace(geometry=reference), maps)
    total = sum(x.sum() for x in found.values())
    assert torch.autograd.grad(total, reference, allow_unused=True) == (None,)


def test_channels_of_the_layer_have_their_precision():
    limits = tolerance(torch.float32, scale=10.0, operations=1000)
    double, detector = make_model(), make_model().float()
    detector.load_state_dict(double.state_dict())
    batch = make_batch([1])
    for one, other in zip(
        detector.predict(detector.preprocess_image(batch)).stages,
        double.predict(double.preprocess_image(batch)).stages,
    ):
        torch.testing.assert_close(one.logits.double(), other.logits, **limits)
