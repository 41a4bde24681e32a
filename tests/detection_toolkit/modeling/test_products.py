"""Products by oneDNN: as exact as PyTorch's own, where they were asked for, and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from patience import PATIENCE
from tolerances import tolerance

from detection_toolkit.config import find_config_file
from detection_toolkit.engine.train_loop import DetectionTrainLoop
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import Execution, products
from detection_toolkit.modeling.products import LEAST_PARAMETERS, by_onednn, wants_onednn
from detection_toolkit.studies.parts import count_operations

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 2\n"
SWITCH = getattr(torch.backends.mkldnn, "matmul", None)
needs_switch = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(SWITCH, "fp32_precision"),
    reason="this PyTorch has no oneDNN or no switch for its products",
)
needs_float32 = pytest.mark.skipif(
    not products._is_float32(), reason="oneDNN rounds to bfloat16 on this processor"
)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def products_of_onednn(capfd):
    """A function: how many products oneDNN has computed in another one."""

    def count(run) -> int:
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            run()
        lines = capfd.readouterr().out.splitlines()
        return sum("exec," in line and ",matmul," in line for line in lines)

    with by_onednn():
        if not count(lambda: draw(128, 128) @ draw(128, 128)):
            pytest.skip("PyTorch does not hand products to oneDNN on this processor")
    return count


@needs_float32
@pytest.mark.parametrize("shape", [(), (24,)], ids=["matrices", "batch"])
@pytest.mark.parametrize("m, k, n", [(200, 128, 64), (33, 70, 129), (1, 512, 300)])
def test_values_and_gradients_are_as_exact_as_pytorchs(shape, m, k, n, products_of_onednn):
    x, y, grad = draw(*shape, m, k), draw(*shape, k, n, seed=2), draw(*shape, m, n, seed=3)
    x.requires_grad_(), y.requires_grad_()
    found = []

    def compute():
        with by_onednn():
            z = x @ y
            found.extend([z.detach(), *torch.autograd.grad(z, [x, y], grad)])

    assert products_of_onednn(compute) == 3
    a, b, c = x.detach().double(), y.detach().double(), grad.double()
    for ours, u, v in zip(found, (a, c, a.mT), (b, b.mT, c)):
        limits = tolerance(torch.float32, (u.abs() @ v.abs()).max().item(), u.shape[-1])
        torch.testing.assert_close(ours.double(), u @ v, **limits)


@needs_float32
def test_matrices_may_lie_in_memory_in_any_way():
    wide = draw(300, 512)
    views = [
        wide[:256, :256],
        wide[:256, ::2],
        wide[:256, :256].t(),
        wide[:1, :256].expand(256, -1),
    ]
    for x in views:
        for y in views:
            with by_onednn():
                ours = x @ y
            expected = x.double() @ y.double()
            scale = (x.double().abs() @ y.double().abs()).max().item()
            torch.testing.assert_close(
                ours.double(), expected, **tolerance(torch.float32, scale, 256)
            )


@needs_switch
def test_the_switch_is_as_before_after_the_last_scope():
    assert SWITCH.fp32_precision == "none"
    with by_onednn():
        assert SWITCH.fp32_precision == "bf16"
        with pytest.raises(KeyError), by_onednn():
            raise KeyError
        assert SWITCH.fp32_precision == "bf16"
    assert SWITCH.fp32_precision == "none"


@needs_switch
def test_scopes_of_several_threads_may_overlap():
    in_scope, other_is_left = threading.Event(), threading.Event()
    found = []

    def late():
        with by_onednn():
            in_scope.set()
            assert other_is_left.wait(PATIENCE)
            found.append(SWITCH.fp32_precision)

    thread = threading.Thread(target=late)
    with by_onednn():
        thread.start()
        assert in_scope.wait(PATIENCE)
    other_is_left.set()
    thread.join()
    assert found == ["bf16"] and SWITCH.fp32_precision == "none"


@needs_switch
@pytest.mark.parametrize(
    "precision, inside, after", [("high", "tf32", "tf32"), ("highest", "bf16", "ieee")]
)
def test_a_precision_that_the_user_has_set_stays(precision, inside, after):
    torch.set_float32_matmul_precision(precision)
    try:
        with by_onednn():
            assert SWITCH.fp32_precision == inside
        assert SWITCH.fp32_precision == after
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        SWITCH.fp32_precision = "none"


@pytest.fixture
def cpu_info(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "CPU_INFO", path)
    return path


@pytest.mark.parametrize(
    "text, expected",
    [
        (AMD, True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: AuthenticAMD\n", False),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", False),
        (None, False),
    ],
)
def test_auto_goes_by_the_processor_and_the_size_of_the_model(
    text, expected, cpu_info, monkeypatch
):
    if text is not None:
        cpu_info.write_text(text)
    monkeypatch.setattr(products, "_is_float32", lambda: True)
    assert wants_onednn("auto", LEAST_PARAMETERS) is expected
    assert not wants_onednn("auto", LEAST_PARAMETERS - 1)
    assert not wants_onednn("torch", LEAST_PARAMETERS)


@needs_switch
def test_where_onednn_rounds_auto_leaves_it_and_onednn_is_an_error(cpu_info, monkeypatch):
    cpu_info.write_text(AMD)
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: bmm(x.bfloat16(), y.bfloat16()).float())
    monkeypatch.setattr(products, "_is_float32", products._is_float32.__wrapped__)
    assert not wants_onednn("auto", LEAST_PARAMETERS)
    with pytest.raises(UserError, match="products=onednn needs .* without AMX.* leave it at auto"):
        wants_onednn("onednn", 0)


def test_an_older_pytorch_computes_by_itself(cpu_info, monkeypatch):
    cpu_info.write_text(AMD)
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", object(), raising=False)
    monkeypatch.setattr(products, "_is_float32", products._is_float32.__wrapped__)
    assert not wants_onednn("auto", LEAST_PARAMETERS)
    with pytest.raises(UserError, match="products=onednn needs PyTorch 2.9 or newer"):
        wants_onednn("onednn", 0)
    with by_onednn():
        assert torch.equal(torch.eye(64) @ torch.eye(64), torch.eye(64))


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ValueError, match="model.execution.products='mkl' is not one of 'auto'"):
        Execution(products="mkl")


def make_detector(choice):
    model = LazyConfig.load(find_config_file("common/models/stageinteractor_tiny.py")).model
    model.execution.products = choice
    torch.manual_seed(0)
    detector = instantiate(model).train()
    with torch.no_grad():  # zero-initialised parts would hide what goes through them
        for parameter in detector.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return detector


def make_batch():
    instances = Instances((96, 128))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 5, 60, 70], [40, 30, 120, 90]]))
    instances.gt_classes = torch.tensor([0, 3])
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 96, 128), generator=generator, dtype=torch.uint8)
    return [{"image": image, "instances": instances, "height": 96, "width": 128}]


def losses_and_gradients(detector):
    detector.zero_grad()
    losses = detector(make_batch())
    with detector.products_of_backward():
        sum(losses.values()).backward()
    values = torch.stack([value.detach().double() for value in losses.values()])
    gradients = [p.grad.double().flatten() for p in detector.parameters() if p.grad is not None]
    return values, torch.cat(gradients)


@needs_float32
def test_a_detector_has_the_losses_and_gradients_that_it_has_without():
    found = [
        losses_and_gradients(detector)
        for detector in (
            make_detector("onednn"),
            make_detector("torch"),
            make_detector("torch").double(),
        )
    ]
    for ours, theirs, expected in zip(*found):
        # Rounding goes through the whole network; as much of it as PyTorch's is no error.
        rounding = (theirs - expected).norm()
        assert (ours - theirs).norm() < 8 * rounding
        assert rounding < 1e-3 * expected.norm()


@needs_float32
def test_all_passes_of_a_detector_are_by_onednn_where_it_is_chosen(products_of_onednn):
    batch = make_batch()
    for choice in ("onednn", "torch"):
        detector = make_detector(choice)
        optimizer = torch.optim.SGD(detector.parameters(), lr=0.0)
        loop = DetectionTrainLoop(detector, [batch] * 4, optimizer, device="cpu")
        loop.iter = 0

        def train(loop=loop):
            with EventStorage():
                loop.run_step()

        step = products_of_onednn(train)
        forward = products_of_onednn(lambda detector=detector: detector(batch))
        counted = products_of_onednn(lambda detector=detector: detector.count_targets(batch))
        detector.eval()
        of_stages = products_of_onednn(lambda detector=detector: detector.inference_stages(batch))
        with torch.no_grad():
            inference = products_of_onednn(lambda detector=detector: detector(batch))
        if choice == "torch":
            assert not any((step, forward, counted, of_stages, inference))
        else:
            assert min(forward, counted, of_stages, inference) > 50
            assert step > 2 * forward  # nearly every product has two in the backward pass
        assert SWITCH.fp32_precision == "none"


def test_bfloat16_is_autocast_around_the_network(monkeypatch):
    detector, plain = make_detector("bfloat16"), make_detector("torch")
    types = set()
    for module in detector.modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_hook(lambda module, x, y: types.add(y.dtype))
    ours = losses_and_gradients(detector)
    monkeypatch.setattr(plain, "products", lambda: torch.autocast("cpu", torch.bfloat16))
    assert all(map(torch.equal, ours, losses_and_gradients(plain)))
    assert types == {torch.bfloat16}
    detector.eval()
    with torch.no_grad():
        found = detector(make_batch())[0]["instances"]
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_may_be_built_without_memory_and_under_autocast(cpu_info, monkeypatch):
    cpu_info.write_text(AMD)
    monkeypatch.setattr(products, "LEAST_PARAMETERS", 1)
    for place in (torch.device("meta"), torch.autocast("cpu", torch.bfloat16)):
        products._is_float32.cache_clear()
        with place:
            make = LazyConfig.load(find_config_file("common/models/stageinteractor_tiny.py")).model
            detector = instantiate(make)
        assert detector._products._by_onednn is products._is_float32()


@needs_float32
def test_operations_are_counted_whatever_computes():
    ours, theirs = make_detector("onednn"), make_detector("torch")
    counted = count_operations(lambda: losses_and_gradients(ours))
    assert counted == count_operations(lambda: losses_and_gradients(theirs)) > 0
