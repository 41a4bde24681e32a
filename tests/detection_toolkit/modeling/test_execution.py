"""Every way of computing gives the same numbers and gradients."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection_toolkit.modeling import Execution
from detection_toolkit.modeling.decoder import _program
from detection_toolkit.modeling.execution import PLAIN
from detection_toolkit.modeling.gathering import GatheringSampler
from detection_toolkit.modeling.sampling import sample_features
from detection_toolkit.structures import Queries, map_tensors
from maps import make_maps
from stageinteractor import CascadeDynamicMixing, FactoredDynamicMixing, StageInteractorDecoder
from stageinteractor.sampling import level_weights

DIRECT = Execution(**PLAIN)
STRIDES = (4, 8)
SIZE = (48, 64)


def make_decoder(execution, **changes):
    torch.manual_seed(0)
    sizes = dict(
        num_stages=4,
        channels=32,
        num_heads=4,
        ffn_channels=16,
        groups=4,
        first_base_points=3,
        base_points=2,
        sub_points=3,
        out_points=6,
    )
    decoder = StageInteractorDecoder(3, **{**sizes, **changes}, execution=execution).double()
    # Zero-initialised parts would hide what goes through them.
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def make_inputs(batch=2, num_queries=5):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = [draw(batch, 32, SIZE[0] // s, SIZE[1] // s).requires_grad_() for s in STRIDES]
    xyzr = draw(batch, num_queries, 4) * torch.tensor([20.0, 20, 1, 0.5]) + torch.tensor(
        [32.0, 24, 4, 0]
    )
    return make_maps(features, STRIDES), Queries(
        draw(batch, num_queries, 32).requires_grad_(), xyzr
    )


def gathered(maps):
    return maps.laid_out(Execution(), torch.float64)


def outcome(decoder):
    """Predictions of all stages, and gradients of parameters, maps and queries."""
    maps, queries = make_inputs()
    outputs = decoder(maps, queries)
    sum((x.logits.square().sum() + x.boxes.square().mean()) for x in outputs).backward()
    leaves = {**dict(decoder.named_parameters()), "queries": queries.content}
    leaves.update({f"map{i}": level for i, level in enumerate(maps.levels)})
    return outputs, {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(first, second):
    for ours, theirs in zip(first[0], second[0]):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=1e-8, atol=1e-8)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=1e-6, atol=1e-9, msg=name)


EXECUTIONS = {
    "gather": Execution(mixing="direct", channels_last=False),
    "factored": Execution(sampling="grid", channels_last=False),
    "both": Execution(),
    "checkpoint": Execution(checkpoint=True),
    "checkpoint_direct": Execution(
        sampling="grid", mixing="direct", channels_last=False, checkpoint=True
    ),
}
VARIANTS = {
    "released": {},
    "reuse_3": {"reuse_start": 3},
    "capped": {"channel_reuse_cap": 1},
    "no_previous_filters": {"apply_reused_channel_filters": False},
    "no_spatial_reuse": {"spatial_reuse": False},
    "no_reuse": {"spatial_reuse": False, "channel_reuse_cap": 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", EXECUTIONS)
def test_every_execution_computes_what_the_equations_do(name, variant):
    changes = VARIANTS[variant]
    expected = outcome(make_decoder(DIRECT, **changes))
    assert_same(outcome(make_decoder(EXECUTIONS[name], **changes)), expected)


def test_weights_do_not_depend_on_the_execution():
    direct, fast = make_decoder(DIRECT), make_decoder(Execution())
    fast.load_state_dict(direct.state_dict())
    assert isinstance(direct.stages[2].mixing, CascadeDynamicMixing)
    assert isinstance(fast.stages[2].mixing, FactoredDynamicMixing)
    assert not isinstance(direct.stages[2].mixing, FactoredDynamicMixing)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    batch=st.integers(1, 2),
    sets=st.integers(1, 3),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_gathering_is_bilinear_sampling_of_any_maps(sizes, batch, sets, groups, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    strides = [4 * 2**i for i in range(len(sizes))]
    leaves = [draw(batch, groups * 2, h, w).requires_grad_() for h, w in sizes]
    xy = draw(batch * sets, 3, groups, 4, 2) * 20  # in and outside of the maps
    leaves += [xy.requires_grad_(), draw(batch * sets, 3, groups, 4).requires_grad_()]
    results = []
    for is_gathered in (False, True):
        maps = make_maps(leaves[: len(sizes)], strides)
        if is_gathered:
            maps = gathered(maps)
        weights = level_weights(leaves[-1], range(len(sizes)))
        values = sample_features(maps, leaves[-2], weights)
        gradients = torch.autograd.grad(values.square().sum(), leaves)
        results.append((values, *gradients))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_points_on_borders_of_cells_and_far_away_have_bilinear_values():
    maps, _ = make_inputs(batch=1)
    # Multiples of 2 are centres and borders of the cells; gradients have kinks there.
    steps = torch.tensor([-1e9, -6, -4, -2, 0, 2, 4, 6, 30, 44, 46, 48, 50, 62, 64, 66, 1e9])
    xy = torch.cartesian_prod(steps, steps).double().view(1, 1, 1, -1, 2).expand(-1, -1, 4, -1, -1)
    z = torch.full(xy.shape[:-1], 3.0, dtype=torch.float64)
    weights = level_weights(z, (3, 4))
    torch.testing.assert_close(
        sample_features(gathered(maps), xy, weights),
        sample_features(maps, xy, weights),
        rtol=0,
        atol=1e-12,
    )


def test_a_gradient_of_points_alone_leaves_nothing_behind():
    plain, _ = make_inputs()
    features, maps = plain.levels, gathered(plain)
    xy = (torch.rand(2, 3, 4, 2, 2, dtype=torch.float64) * 40).requires_grad_()
    z = torch.full((2, 3, 4, 2), 3.0, dtype=torch.float64)
    values = sample_features(maps, xy, level_weights(z, (3, 4)))
    torch.autograd.grad(values.sum(), xy, retain_graph=True)
    first = torch.autograd.grad(values.sum(), features, retain_graph=True)
    second = torch.autograd.grad(values.sum(), features)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0


def test_maps_that_need_no_gradient_get_none():
    maps, queries = make_inputs()
    frozen = map_tensors(torch.Tensor.detach, maps)
    outputs = make_decoder(Execution())(frozen, queries)
    outputs[-1].logits.sum().backward()
    assert queries.content.grad is not None


def test_a_point_that_is_not_a_number_stays_one():
    maps = gathered(make_inputs(batch=1)[0])
    xy = torch.full((1, 1, 4, 2, 2), 10.0, dtype=torch.float64)
    xy[0, 0, 0, 0, 0] = float("nan")
    z = torch.full((1, 1, 4, 2), 3.0, dtype=torch.float64)
    values = sample_features(maps, xy, level_weights(z, (3, 4)))
    assert values[0, 0, 0, 0].isnan().all()
    assert not values[0, 0, 1:].isnan().any() and not values[0, 0, 0, 1].isnan().any()


def test_maps_in_channels_last_format_are_not_copied():
    feature = torch.randn(2, 8, 3, 4).to(memory_format=torch.channels_last)
    (table,) = GatheringSampler([feature], dtype=torch.float32).tables
    assert table.data_ptr() == feature.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through_every_execution(dtype):
    for execution in (DIRECT, Execution()):
        decoder = make_decoder(execution).float()
        inputs = map_tensors(lambda x: x.detach().float(), make_inputs())
        with torch.autocast("cpu", dtype):
            outputs = decoder(*inputs)
            outputs[-1].logits.float().square().sum().backward()
        # Geometry stays in float32: half precision has too few bits for a coordinate.
        assert outputs[-1].boxes.dtype == outputs[-1].queries.geometry.dtype == torch.float32
        assert all(p.grad is not None for p in decoder.stages[-1].mixing.parameters())


def kept_for_the_backward_pass(execution, **sizes):
    """Numbers that autograd keeps, each once, without the parameters."""
    decoder = make_decoder(execution, **sizes)
    parameters = {p.data_ptr() for p in decoder.parameters()}
    kept = {}

    def keep(x):
        if x.data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x  # alive, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        decoder(*make_inputs(num_queries=20))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_less_is_kept_for_the_backward_pass():
    # Channels and points as many as in the released model, in proportion.
    sizes = dict(groups=2, base_points=2, sub_points=4, out_points=32, num_stages=6)
    direct = kept_for_the_backward_pass(Execution(mixing="direct", channels_last=False), **sizes)
    factored = kept_for_the_backward_pass(Execution(), **sizes)
    checkpointed = kept_for_the_backward_pass(Execution(checkpoint=True), **sizes)
    assert factored < 0.8 * direct
    assert checkpointed < 0.3 * factored


def test_the_compiled_decoder_is_one_program_for_all_image_sizes():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    decoder = make_decoder(Execution(compile="default"))
    decoder._program = torch.compile(partial(_program, decoder), backend=counter, fullgraph=True)
    plain = make_decoder(DIRECT)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for height, width in ((48, 64), (64, 64), (96, 80), (32, 128)):
            _, queries = make_inputs()
            levels = [
                torch.randn(
                    2, 32, height // s, width // s, generator=generator, dtype=torch.float64
                )
                for s in STRIDES
            ]
            ours = decoder(make_maps(levels, STRIDES), queries)
            theirs = plain(make_maps(levels, STRIDES), queries)
            torch.testing.assert_close(ours[-1].boxes, theirs[-1].boxes, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(ours[-1].logits, theirs[-1].logits, rtol=1e-8, atol=1e-9)
    assert counter.frame_count == 1


def test_the_compiled_decoder_has_the_gradients_that_it_has_otherwise():
    torch._dynamo.reset()
    decoder = make_decoder(Execution(compile="default"))
    # The compiler's own derivatives, without the minutes for its code.
    decoder._program = torch.compile(partial(_program, decoder), backend="aot_eager")
    found = []
    for each in (decoder, make_decoder(DIRECT)):
        maps, queries = make_inputs()
        outputs = each(maps, queries)
        loss = sum((x.logits.sin().sum() + x.boxes.sin().sum()) for x in outputs)
        parameters = dict(each.named_parameters())
        leaves = [*maps.levels, *parameters.values()]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append(dict(zip([*range(len(maps.levels)), *parameters], gradients)))
    for name, expected in found[1].items():
        ours = found[0][name]
        assert (ours is None) == (expected is None), name
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8, msg=str(name))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sampling": "grids"}, "model.execution.sampling='grids' is not one of 'auto'"),
        ({"mixing": ""}, "model.execution.mixing"),
        ({"compile": "true"}, "model.execution.compile"),
        ({"compile": "default", "checkpoint": True}, "model.execution.checkpoint=false"),
        ({"compile": "default", "cuda_graphs": True}, "model.execution.cuda_graphs"),
    ],
)
def test_unknown_choices_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Execution(**arguments)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_computes_what_bilinear_sampling_does():
    # Triton decides when it is imported whether it interprets its kernels, as it must on a CPU.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).parent / "interpret_triton_sampling.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "192 comparisons" in done.stdout
