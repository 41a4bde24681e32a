import pytest
import torch

from detection_toolkit.modeling import QUERY_HEADS, CascadeDecoder
from detection_toolkit.structures import map_tensors
from maps import make_maps
from stageinteractor import InitialQueries, StageInteractorDecoder

STRIDES = (4, 8, 16, 32)
SMALL = dict(
    channels=16,
    num_heads=2,
    ffn_channels=24,
    groups=2,
    first_base_points=3,
    base_points=2,
    sub_points=2,
    out_points=4,
)


def make_decoder(**kwargs):
    torch.manual_seed(0)
    decoder = StageInteractorDecoder(3, **{**SMALL, **kwargs})
    with torch.no_grad():  # layers that start at zero would hide what depends on them
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder


def make_inputs(sizes=((64, 96), (50, 80)), num_queries=5):
    torch.manual_seed(1)
    features = [torch.randn(len(sizes), 16, 64 // s, 96 // s) for s in STRIDES]
    maps = make_maps(features, STRIDES, sizes)
    return maps, InitialQueries(num_queries, 16)(maps)


def bank_sizes(decoder):
    """How many earlier filters each stage finds."""
    sizes = []
    for stage in decoder.stages:
        stage.mixing.register_forward_pre_hook(lambda m, args: sizes.append(len(args[2])))
    decoder(*make_inputs())
    return sizes


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, [0, 0, 1, 2, 3, 4]),
        ({"reuse_start": 3}, [0, 0, 0, 1, 2, 3]),
        ({"num_stages": 3}, [0, 0, 1]),
        ({"reuse_start": 9}, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_bank_holds_the_stages_from_the_one_before_the_reuse_start(kwargs, expected):
    assert bank_sizes(make_decoder(**kwargs)) == expected


def test_every_stage_yields_predictions_of_all_queries():
    outputs = make_decoder()(*make_inputs())
    assert len(outputs) == 6
    for output in outputs:
        assert output.logits.shape == (2, 5, 3)
        assert output.boxes.shape == output.queries.geometry.shape == (2, 5, 4)
        assert output.queries.content.shape == (2, 5, 16)


def test_box_losses_of_a_stage_reach_only_its_own_box_tower_and_the_queries_before():
    decoder = make_decoder(num_stages=3)
    outputs = decoder(*make_inputs())
    outputs[2].boxes.sum().backward()
    assert decoder.stages[2].box_tower.out.weight.grad.abs().sum() > 0
    # The geometry is cut between stages, the content and the filters are not.
    assert decoder.stages[1].box_tower.out.weight.grad is None
    assert decoder.stages[1].mixing.filter_generator.weight.grad.abs().sum() > 0
    assert decoder.stages[0].ffn.linear1.weight.grad.abs().sum() > 0


def test_permuting_the_queries_permutes_the_predictions():
    decoder = make_decoder().double()
    maps, queries = map_tensors(torch.Tensor.double, make_inputs())
    order = torch.tensor([3, 1, 4, 0, 2])
    plain = decoder(maps, queries)
    permuted = decoder(maps, map_tensors(lambda x: x[:, order], queries))
    torch.testing.assert_close(permuted[-1].boxes, plain[-1].boxes[:, order])


def test_images_of_a_batch_do_not_see_each_other():
    decoder = make_decoder().double()
    inputs = map_tensors(torch.Tensor.double, make_inputs())
    together = decoder(*inputs)[-1]
    for b in range(2):
        alone = decoder(*map_tensors(lambda x, b=b: x[b : b + 1], inputs))
        torch.testing.assert_close(alone[-1].logits[0], together.logits[b])


@pytest.mark.parametrize("spatial_reuse", [True, False])
@pytest.mark.parametrize("cap, expected", [(None, True), (1, True), (0, False)])
def test_the_mix_bias_exists_only_with_channel_reuse(cap, expected, spatial_reuse):
    decoder = make_decoder(spatial_reuse=spatial_reuse, channel_reuse_cap=cap)
    found = [stage.mixing.bias_generator is not None for stage in decoder.stages]
    assert found == [expected] * decoder.num_stages


def test_query_heads_are_registered():
    assert QUERY_HEADS.get("StageInteractorDecoder") is StageInteractorDecoder
    assert QUERY_HEADS.get("CascadeDecoder") is CascadeDecoder


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_stages": 0}, "num_stages"),
        ({"reuse_start": 0}, "reuse_start"),
        ({"reuse_start": 1}, "first_base_points"),
        ({"groups": 3}, "16 channels cannot be split into 3 groups"),
        ({"num_heads": 3}, "3 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        StageInteractorDecoder(3, **{**SMALL, **kwargs})


def test_reuse_may_start_at_stage_one_when_the_points_agree():
    decoder = make_decoder(reuse_start=1, first_base_points=2)
    assert bank_sizes(decoder) == [0, 1, 2, 3, 4, 5]
