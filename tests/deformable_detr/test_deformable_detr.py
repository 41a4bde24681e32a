"""The parts of Deformable DETR, and what the toolkit does with it."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from deformable_detr_models import VARIANTS, make_model
from small_runs import make_batch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from deformable_detr import (
    AnyPairMatcher,
    DeformableAttention,
    ExtraLevelMapper,
    ProposedQueries,
)
from deformable_detr.heads import inverse_sigmoid, move_reference
from deformable_detr.positions import cell_centers, mask_positions, to_maps, to_tokens
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import Execution, FeatureMaps, PlainConvNet
from detection_toolkit.modeling.decoder import _program
from detection_toolkit.structures import Assignment, GroundTruth
from maps import make_maps
from sqr import QueryRecollection, plain_schedule, selective_schedule


def test_attention_of_untrained_heads_looks_in_directions_of_its_own():
    attention = DeformableAttention(32, num_heads=8, num_levels=2, num_points=3)
    places = attention.sampling_offsets.bias.view(8, 2, 3, 2)
    torch.testing.assert_close(places[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    torch.testing.assert_close(places[1, 1], torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
    assert not attention.sampling_offsets.weight.any()


@pytest.mark.parametrize("kind", ["point", "box"])
@pytest.mark.parametrize("sampling", ["gather", "grid"])
def test_attention_is_what_the_paper_writes(kind, sampling):
    """Head by head, level by level and point by point."""
    torch.manual_seed(0)
    channels, heads, points = 8, 2, 3
    attention = DeformableAttention(
        channels,
        num_heads=heads,
        num_levels=2,
        num_points=points,
        execution=Execution(sampling=sampling),
    ).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter))
    levels = [torch.randn(2, channels, *size, dtype=torch.float64) for size in ((4, 6), (2, 3))]
    maps = make_maps(levels, (8, 16), [(32, 48), (20, 30)])
    queries = torch.randn(2, 5, channels, dtype=torch.float64)
    references = torch.rand(2, 5, 2, 2 if kind == "point" else 4, dtype=torch.float64)
    ours = attention(queries, references, maps)

    offsets = attention.sampling_offsets(queries).view(2, 5, heads, 2, points, 2)
    weights = attention.attention_weights(queries).view(2, 5, heads, 2 * points).softmax(-1)
    values = []
    for level, mask in zip(levels, maps.padding_masks):
        value = attention.value_proj(level.permute(0, 2, 3, 1))
        values.append(torch.where(mask[..., None], 0.0, value).permute(0, 3, 1, 2))
    attended = torch.zeros(2, 5, channels, dtype=torch.float64)
    for head in range(heads):
        own = slice(head * channels // heads, (head + 1) * channels // heads)
        for i, value in enumerate(values):
            height, width = value.shape[-2:]
            for p in range(points):
                offset = offsets[:, :, head, i, p]
                if kind == "point":
                    step = offset / torch.tensor([width, height])
                else:
                    step = offset / points * references[:, :, i, 2:] / 2
                place = references[:, :, i, :2] + step
                sampled = nn.functional.grid_sample(
                    value[:, own], 2 * place[:, :, None] - 1, align_corners=False
                )[..., 0]
                weight = weights[:, :, head, i * points + p]
                attended[:, :, own] += (sampled * weight[:, None]).transpose(1, 2)
    torch.testing.assert_close(ours, attention.output_proj(attended))


def test_positions_count_cells_that_are_no_padding():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, 3:] = mask[:, :, 4:] = True
    code = mask_positions(mask, 8, torch.float64)
    # The first two channels of y and of x: sine and cosine of the share times a full turn.
    angle = torch.atan2(code[0, 0], code[0, 1])[:3, :4] / (2 * torch.pi) % 1
    # The count is divided by 1e-6 more than the cells, so that padding divides by no zero.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
    close(angle[:, 0], torch.tensor([1, 3, 5], dtype=torch.float64) / 6)
    angle = torch.atan2(code[0, 4], code[0, 5])[:3, :4] / (2 * torch.pi) % 1
    close(angle[0], torch.tensor([1, 3, 5, 7], dtype=torch.float64) / 8)


def test_tokens_are_cells_row_by_row():
    levels = [torch.randn(2, 3, 4, 6), torch.randn(2, 3, 2, 3)]
    maps = make_maps(levels, (8, 16), [(32, 48), (16, 24)])
    tokens = to_tokens(levels)
    assert tokens.shape == (2, 30, 3)
    assert torch.equal(tokens[:, 7], levels[0][:, :, 1, 1])
    for level, again in zip(levels, to_maps(tokens, maps).levels):
        assert torch.equal(level, again)
    centers = cell_centers(maps)
    torch.testing.assert_close(centers[0, 7], torch.tensor([1.5 / 6, 1.5 / 4]))
    torch.testing.assert_close(centers[1, 7], torch.tensor([1.5 / 3, 1.5 / 2]))


def test_places_keep_apart_in_maps_of_lower_precision():
    """Under autocast a map of 1333 pixels has 167 columns, and numbers of 8 bits."""
    maps = make_maps([torch.zeros(1, 3, 2, 167)], (8,), [(16, 1333)])
    expected = cell_centers(maps)
    half = make_maps([torch.zeros(1, 3, 2, 167, dtype=torch.bfloat16)], (8,), [(16, 1333)])
    assert torch.equal(cell_centers(half), expected)
    assert len(expected[0, :, 0].unique()) == 167


def test_a_point_moves_and_the_change_is_the_logit_of_its_size():
    delta = torch.tensor([0.3, -0.2, 0.7, -1.0])
    point = torch.tensor([0.25, 0.5])
    expected = torch.cat([(point.logit() + delta[:2]), delta[2:]]).sigmoid()
    torch.testing.assert_close(move_reference(point, delta), expected)
    assert inverse_sigmoid(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_detections_lie_within_their_image_alone_or_padded(variant):
    detector = make_model(variant).double().eval()
    small, large = make_batch([1, 1])
    small["image"] = small["image"][:, :40, :56]
    small["height"], small["width"] = 40, 56
    alone = detector([small])[0]["instances"]
    together = detector([small, large])[0]["instances"]
    for instances in (alone, together):
        boxes = instances.pred_boxes.tensor
        assert boxes.isfinite().all() and boxes.min() >= 0
        assert (boxes[:, 2] <= 56).all() and (boxes[:, 3] <= 40).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("execution", ["sampling=grid", "channels_last=false", "checkpoint=true"])
def test_ways_of_computing_agree(variant, execution):
    batch, results = make_batch([2, 1]), []
    weights = make_model(variant).state_dict()
    for overrides in ([], [f"model.execution.{execution}"]):
        detector = make_model(variant, *overrides).double().train()
        detector.load_state_dict(weights)
        losses = detector(batch)
        sum(losses.values()).backward()
        results.append((losses, [p.grad for p in detector.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_the_compiled_decoder_is_one_program_from_the_second_image_size_on():
    variant = "refine"  # its first stage has points, the others boxes
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    detector = make_model(variant, "model.execution.compile=default").double().eval()
    program = partial(_program, detector.decoder)
    detector.decoder._program = torch.compile(program, backend=counter, fullgraph=True)
    plain = make_model(variant).double().eval()
    with torch.no_grad():
        for height, width in ((96, 128), (80, 200), (160, 130)):
            large, small = make_batch([1, 1], height=height, width=width)
            small["image"] = small["image"][:, :70, :90]  # the masks are part of the program
            images = detector.preprocess_image([large, small])
            for ours, theirs in zip(detector.predict(images).stages, plain.predict(images).stages):
                torch.testing.assert_close(ours.boxes, theirs.boxes)
                torch.testing.assert_close(ours.logits, theirs.logits)
    assert counter.frame_count == 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_the_maps_of_a_step_do_not_outlive_it(variant, training):
    detector = make_model(variant).train(training)
    tables = []
    laid_out = FeatureMaps.laid_out

    def note(maps, *arguments):
        result = laid_out(maps, *arguments)
        tables.extend(weakref.ref(table) for table in result.sampler.tables)
        return result

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureMaps, "laid_out", note)
            result = detector(make_batch([2, 0]))
            if training:
                sum(result.values()).backward()
        del result
        assert len(tables) == 4 * 3  # levels, layers and stages
        assert not any(reference() is not None for reference in tables)
    finally:
        gc.enable()


def test_stages_refine_boxes_and_no_gradient_goes_through_them():
    detector = make_model("refine").double().train()
    maps = detector.extract_features(detector.preprocess_image(make_batch([1, 1])))
    first, second = detector.decoder(maps, detector.initial_queries(maps))
    sizes = maps.image_sizes.flip(-1).repeat(1, 2)[:, None]
    center = (first.boxes[..., :2] + first.boxes[..., 2:]) / 2 / sizes[..., :2]
    torch.testing.assert_close(first.queries.geometry[..., :2], center.detach())
    assert not first.queries.geometry.requires_grad and second.boxes.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_route_is_the_plain_detector_bit_for_bit(variant):
    batch, results = make_batch([2, 1]), []
    for route in (None, QueryRecollection(plain_schedule(2))):
        detector = make_model(variant).train()
        if route is not None:
            detector.decoder.route = route
            detector.criterion = route.supervise(detector.criterion)
        results.append(detector(batch))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batched", [True, False])
def test_with_recollection_the_last_groups_are_what_inference_does(variant, batched):
    """Also where boxes are refined, which the released code does not support."""
    detector = make_model(variant).double().train()
    maps = detector.extract_features(detector.preprocess_image(make_batch([1, 1])))
    queries = detector.initial_queries(maps)
    expected = detector.decoder(maps, queries)
    schedule = selective_schedule(2)
    detector.decoder.route = QueryRecollection(schedule, batched=batched)
    outputs = detector.decoder(maps, queries)
    assert len(outputs) == schedule.num_groups == 3
    for stage, output in enumerate(expected):
        torch.testing.assert_close(outputs[schedule.groups(stage)[-1]].boxes, output.boxes)
    # The first group of the last stage starts from the initial queries and their own references.
    alone, _ = detector.decoder.run_stage(1, queries, maps, None)
    torch.testing.assert_close(outputs[1].boxes, alone.boxes)
    torch.testing.assert_close(outputs[1].logits, alone.logits)


def test_proposals_too_many_for_the_cells_are_refused():
    queries = ProposedQueries(7, 8, 3)
    maps = make_maps([torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 1, 1)], (8, 16))
    with pytest.raises(UserError, match="7 queries cannot be chosen from 5 cells"):
        queries(maps)


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="built for 3 levels, but the backbone yields 4"):
        make_model("plain", "model.encoder.num_levels=3")(make_batch([1, 1]))
    with pytest.raises(UserError, match="res9"):
        ExtraLevelMapper(PlainConvNet(widths=[8, 8, 8, 8]), ["res9"], 32)


def test_any_pair_takes_labels_that_the_paper_does_not():
    """Query 0 is given object 0 and query 1 object 1, and each has the other's box."""
    truth = GroundTruth.collate(
        [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])], [torch.tensor([0, 1])], [(40, 40)]
    )
    assignment = Assignment(torch.tensor([[[0, 1]]]))
    boxes = truth.boxes.flip(1)[None]
    matcher = AnyPairMatcher([[0]])
    targets = matcher(assignment, boxes, truth, num_classes=3).multi_hot
    # Query 0's object is covered by query 1, whose object has class 1; and the other way round.
    assert targets.tolist() == [[[[0, 1, 0], [1, 0, 0]]]]
    assert not matcher.sources(assignment, boxes, truth).any()
    own = matcher.sources(assignment, truth.boxes[None], truth)
    assert own.all()


def test_candidates_are_checked():
    with pytest.raises(UserError, match="stage 0 without a candidate"):
        AnyPairMatcher([[-1], [0]])
    with pytest.raises(UserError, match="2 entries"):
        AnyPairMatcher([[0], [0]]).check_fits(3)
    assert AnyPairMatcher([[-1, 1], [-1, 0]]).candidates == [[1], [0, 1]]
