"""Linear layers by oneDNN compute what PyTorch's own do, and step back where anything looks."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from tolerances import tolerance
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from detection_toolkit.config import find_config_file
from detection_toolkit.modeling import Execution, products
from detection_toolkit.modeling.products import OneDnnLinear, use_onednn, wants_onednn
from detection_toolkit.studies.parts import count_operations
from stageinteractor import factored_mixing

needs_onednn = pytest.mark.skipif(
    not wants_onednn("onednn"), reason="this PyTorch has no oneDNN or not its linear product"
)
pytestmark = needs_onednn

# Each with 2^24 operations or more: both ways to get a weight's gradient, and the smallest.
SHAPES = [((2, 128), 128, 512), ((2, 1024), 512, 128), ((3, 5, 70), 128, 64), ((256,), 256, 128)]


def make_layer(inputs=128, outputs=512, *, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    use_onednn(layer)
    assert type(layer) is OneDnnLinear
    return layer


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_gradients(linear, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, weight)]
    if bias is not None:
        leaves.append(bias.detach().clone().requires_grad_())
    y = linear(*leaves, *([None] if bias is None else []))
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.fixture
def calls(monkeypatch):
    """Products that oneDNN is asked for."""
    made = []
    plain = products.product

    def counted(*arguments):
        made.append(arguments[0].shape)
        return plain(*arguments)

    monkeypatch.setattr(products, "product", counted)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead, inputs, outputs", SHAPES)
def test_values_and_gradients_are_those_of_pytorch(lead, inputs, outputs, bias, calls):
    layer = make_layer(inputs, outputs, bias=bias)
    x, grad = draw(*lead, inputs), draw(*lead, outputs, seed=2)

    def by_layer(x, weight, bias):
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, tensors, x)

    ours = with_gradients(by_layer, x, layer.weight, layer.bias, grad)
    assert len(calls) == 3
    double = [None if t is None else t.double() for t in (x, layer.weight, layer.bias, grad)]
    theirs = with_gradients(F.linear, *double)
    n = x.numel() // inputs
    x, weight, grad = (t.abs() for t in (x, layer.weight.detach(), grad))
    # Sums of absolute addends, and how many there are.
    addends = [
        (x @ weight.t() + (layer.bias.abs().max() if bias else 0), inputs),
        (grad @ weight, outputs),
        (grad.flatten(0, -2).t() @ x.flatten(0, -2), n),
        (grad.flatten(0, -2).sum(0), n),
    ]
    for value, expected, (total, roundings) in zip(ours, theirs, addends):
        assert value.is_contiguous()
        limits = tolerance(torch.float32, total.max().item(), roundings)
        torch.testing.assert_close(value.double(), expected, **limits)


def test_arguments_may_lie_in_memory_in_any_way(calls):
    layer = make_layer(256, 256)
    wide, grad = draw(256, 512), draw(256, 512, seed=2)
    for x, g in ((wide.t()[:256].t(), grad[:, ::2]), (wide[:, ::2], grad[:, 256:].t())):
        leaf = x.requires_grad_(False).clone(memory_format=torch.preserve_format)
        leaf = torch.as_strided(wide, x.shape, x.stride(), x.storage_offset()).requires_grad_()
        y = layer(leaf)
        ours = torch.autograd.grad(y, [leaf, layer.weight], g)
        theirs = (g.double() @ layer.weight.double(), g.double().t() @ x.double())
        scale = 256 * g.abs().max().item() * max(x.abs().max().item(), 1)
        for value, expected in zip(ours, theirs):
            limits = tolerance(torch.float32, scale, 256)
            torch.testing.assert_close(value.double(), expected.detach(), **limits)
        leaf.requires_grad_(False)
    assert len(calls) == 6


def test_what_needs_no_gradient_is_not_computed(calls):
    layer = make_layer()
    layer(draw(256, 128)).sum().backward()
    assert len(calls) == 2  # the values, and the gradient of the weight
    layer.requires_grad_(False)
    x = draw(256, 128).requires_grad_()
    layer(x).sum().backward()
    assert len(calls) == 4 and x.grad is not None


@pytest.mark.parametrize("lead", [(256,), (2, 128)])
def test_results_may_be_changed_in_place(lead, calls):
    layer = make_layer()
    x = draw(*lead, 128).requires_grad_()
    (of_x,) = torch.autograd.grad(layer(x).relu_().sum(), x)
    assert calls
    of_y = (layer(x) > 0).double()
    limits = tolerance(torch.float32, 512 * layer.weight.abs().max().item(), 512)
    torch.testing.assert_close(of_x.double(), of_y @ layer.weight.double(), **limits)


def test_two_runs_agree_bit_for_bit(calls):
    def run():
        layer = make_layer()
        x = draw(512, 128).requires_grad_()
        layer(x).square().sum().backward()
        return x.grad, layer.weight.grad, layer.bias.grad

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)
    assert len(calls) == 6


def test_gradients_of_gradients_are_those_of_pytorch():
    layer = make_layer()
    x = draw(256, 128).requires_grad_()

    def penalty(linear):
        (of_x,) = torch.autograd.grad(linear(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(of_x.square().sum(), [x, layer.weight])

    plain = penalty(lambda x: F.linear(x, layer.weight, layer.bias))
    for ours, theirs in zip(penalty(layer), plain):
        scale = 128 * 512 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, **tolerance(torch.float32, scale, 4))


@pytest.mark.parametrize(
    "lead, inputs, outputs, dtype",
    [
        ((256,), 128, 512, torch.float64),
        ((16,), 128, 512, torch.float32),
        ((0,), 8, 8, torch.float32),
    ],
)
def test_other_tensors_are_pytorchs_exactly(lead, inputs, outputs, dtype, calls):
    layer = make_layer(inputs, outputs, dtype=dtype)
    x = draw(*lead, inputs, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not calls


def test_one_vector_is_pytorchs(calls):
    layer = make_layer(4096, 2048)
    x = draw(4096)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and not calls


def _autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def _meta(layer, x):
    assert layer.to("meta")(x.to("meta")).is_meta


def _subclass(layer, x):
    class Own(Tensor):
        pass

    assert isinstance(layer(x.as_subclass(Own)), Own)


def _func(layer, x):
    state = dict(layer.named_parameters())

    def loss(state, x):
        return torch.func.functional_call(layer, state, x).sum()

    assert torch.func.grad(loss)(state, x)["bias"].eq(len(x)).all()
    assert torch.func.vmap(layer)(x[None]).shape == (1, 256, 512)


def _forward_mode(layer, x):
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None


def _trace(layer, x):
    graph = str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)
    assert "aten::linear" in graph and "mkldnn" not in graph


def _export(layer, x):
    graph = str(torch.export.export(layer, (x,)).graph)
    assert "aten.linear" in graph and "mkldnn" not in graph


def _compile(layer, x):
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(x).sum().backward()
    assert layer.weight.grad is not None


def _counter(layer, x):
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    # Gradients of what needs none are not computed: of the three products two.
    assert counter.get_total_flops() == 2 * 2 * 256 * 128 * 512


def _disabled(layer, x):
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)


@pytest.mark.parametrize(
    "look",
    [
        _autocast,
        _meta,
        _subclass,
        _func,
        _forward_mode,
        _trace,
        _export,
        _compile,
        _counter,
        _disabled,
    ],
)
def test_who_looks_at_operators_sees_pytorchs(look, calls):
    look(make_layer(), draw(256, 128))
    assert not calls


def test_a_backward_pass_is_counted_apart_from_its_forward_pass(calls):
    y = make_layer()(draw(256, 128))
    assert len(calls) == 1
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 256 * 128 * 512 and len(calls) == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 2\n", True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: AuthenticAMD\n", False),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", False),
        (None, False),
    ],
)
def test_auto_goes_by_the_vendor_of_the_processor(text, expected, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(products, "CPU_INFO", path)
    assert wants_onednn("auto") is expected
    assert wants_onednn("onednn") and not wants_onednn("torch")


def test_without_the_operator_it_is_pytorch(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not wants_onednn("onednn") and not wants_onednn("auto")


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ValueError, match="model.execution.products='mkl' is not one of 'auto'"):
        Execution(products="mkl")


def test_weights_names_and_subclasses_stay():
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(2, 3), nn.MultiheadAttention(4, 2), Own(3, 3))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    use_onednn(module)
    assert [type(part) for part in module] == [OneDnnLinear, nn.MultiheadAttention, Own]
    after = module.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    file = io.BytesIO()
    torch.save(module[0], file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is OneDnnLinear


@pytest.fixture(scope="module")
def detectors():
    """The same small detector three times: by oneDNN, by PyTorch, and by PyTorch in float64."""
    model = LazyConfig.load(find_config_file("common/models/stageinteractor_tiny.py")).model
    found = []
    for choice in ("onednn", "torch", "torch"):
        model.execution.products = choice
        torch.manual_seed(0)
        found.append(instantiate(model).train())
        with torch.no_grad():  # zero-initialised parts would hide what goes through them
            for parameter in found[-1].parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    return found[0], found[1], found[2].double()


def _losses_and_gradients(detector):
    instances = Instances((96, 128))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 5, 60, 70], [40, 30, 120, 90]]))
    instances.gt_classes = torch.tensor([0, 3])
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 96, 128), generator=generator, dtype=torch.uint8)
    detector.zero_grad()
    losses = detector([{"image": image, "instances": instances}])
    sum(losses.values()).backward()
    values = torch.stack([value.detach().double() for value in losses.values()])
    gradients = [p.grad.double().flatten() for p in detector.parameters() if p.grad is not None]
    return values, torch.cat(gradients)


def test_a_detector_has_the_losses_and_gradients_that_it_has_without(detectors, calls, monkeypatch):
    monkeypatch.setattr(products, "LEAST_OPERATIONS", 1)
    monkeypatch.setattr(factored_mixing, "product", products.product)
    by_onednn, by_pytorch, exact = map(_losses_and_gradients, detectors)
    assert len(calls) > 100
    for ours, theirs, expected in zip(by_onednn, by_pytorch, exact):
        # Rounding goes through the whole network; as much of it as PyTorch's is no error.
        rounding = (theirs - expected).norm()
        assert (ours - theirs).norm() < 8 * rounding
        assert rounding < 1e-3 * expected.norm()


def test_detectors_that_compute_in_float64_or_by_pytorch_do_not_ask(detectors, calls, monkeypatch):
    monkeypatch.setattr(products, "LEAST_OPERATIONS", 1)
    monkeypatch.setattr(factored_mixing, "product", products.product)
    for detector in detectors[1:]:
        _losses_and_gradients(detector)
    assert not calls
    assert list(detectors[0].state_dict()) == list(detectors[1].state_dict())


def test_operations_are_counted_whatever_computes(detectors, calls, monkeypatch):
    monkeypatch.setattr(products, "LEAST_OPERATIONS", 1)
    by_onednn, by_pytorch = (
        count_operations(lambda: _losses_and_gradients(detector))  # noqa: B023
        for detector in detectors[:2]
    )
    assert by_onednn == by_pytorch > 0 and not calls
