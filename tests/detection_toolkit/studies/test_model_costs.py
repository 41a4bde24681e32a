"""Costs of models, held against counts by hand and by PyTorch's own counter."""

from __future__ import annotations

import json

import analyze_model
import pytest
import torch
from small_runs import SMALL_MODEL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d

from detection_toolkit.config import apply_overrides, find_config_file, get_config
from detection_toolkit.studies import model_costs
from dfvt import VARIANTS, DFvTBackbone
from stageinteractor import FilterBank
from stageinteractor.mixing import CascadeDynamicMixing

SMALL = "stageinteractor/shapes_tiny.py"
ARGUMENTS = ["--config-file", SMALL, "--size", "64", "96"]


class Call(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def flops(module, *inputs):
    modules, operators, _ = model_costs.count(module.eval(), inputs)
    assert modules[0].flops == sum(operators.values())
    return dict(operators)


def test_products_that_fvcore_does_not_know():
    a, b, c = torch.rand(2, 3, 4), torch.rand(2, 4, 5), torch.rand(2, 3, 5)
    assert flops(Call(torch.baddbmm), c, a, b) == {"baddbmm": 2 * 3 * 4 * 5}
    assert flops(Call(torch.lerp), a, a, a) == {"lerp": 24}

    q, k = torch.rand(2, 6, 7, 8), torch.rand(2, 6, 9, 8)
    attention = Call(nn.functional.scaled_dot_product_attention)
    products = 2 * 6 * 7 * 9 * 8
    assert flops(attention, q, k, k) == {"scaled_dot_product_attention": 2 * products}

    rows, table, weights = torch.randint(9, (5, 4)), torch.rand(9, 3), torch.rand(5, 4)

    def bag(table, rows, weights):
        return nn.functional.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    assert flops(Call(bag), table, rows, weights) == {"embedding_bag": 5 * 4 * 3}


def test_attention_of_pytorch_costs_the_same_fused_or_not():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.rand(2, 5, 8)
    expected = 2 * 5 * (4 * 8 * 8) + 2 * 2 * 5 * 5 * 8
    for mask in (None, torch.zeros(4, 5, 5)):

        def attend(module, x, mask=mask):
            return module(x, x, x, attn_mask=mask, need_weights=False)[0]

        class Attend(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = attention

            def forward(self, x, attend=attend):
                return attend(self.attention, x)

        assert sum(flops(Attend(), x).values()) == expected


def test_deformable_convolution_is_a_convolution_and_its_sampling():
    class Deform(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DeformConv2d(8, 6, 3, padding=1, stride=2, groups=2)

        def forward(self, x, offset):
            return self.conv(x, offset)

    x, offset = torch.rand(2, 8, 10, 12), torch.zeros(2, 18, 5, 6)
    places = 2 * 5 * 6 * 9
    assert flops(Deform(), x, offset) == {"deform_conv2d": places * (6 * 8 // 2 + 4 * 8)}


def test_dynamic_mixing_by_hand():
    c, g, p, q, o, n = 16, 2, 2, 3, 4, 5
    e, points = c // g, p * q
    arguments = dict(groups=g, base_points=p, sub_points=q, out_points=o)

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing = CascadeDynamicMixing(c, **arguments)

        def forward(self, queries, x):
            return self.mixing(queries, x, FilterBank())[0]

    found = flops(Mix(), torch.rand(1, n, c), torch.rand(1, n, g, points, e))
    generators = c * g * (e * e + o * points) + c * g * (e + o)
    assert found["linear"] == n * (generators + g * o * e * c)
    products = n * g * (points * e * e + o * points * e)
    assert found["matmul"] == products


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    cfg = apply_overrides(get_config(SMALL), SMALL_MODEL)
    return model_costs.prepare(cfg, "cpu"), [{"image": torch.zeros(3, 64, 96)}]


def test_products_are_those_of_pytorchs_counter(detector):
    model, inputs = detector
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    _, operators, _ = model_costs.count(model, inputs)
    # What the other one leaves out; it counts both of multiply and add.
    beside = {"group_norm", "layer_norm", "grid_sampler", "embedding_bag", "lerp"}
    beside.add("scaled_dot_product_attention")
    products = sum(v for k, v in operators.items() if k not in beside)
    assert products == counter.get_total_flops() / 2 > 0


def test_modules_add_up(detector):
    model, inputs = detector
    modules, operators, _ = model_costs.count(model, inputs)
    by_name = {m.name: m for m in modules}
    total = by_name[""]
    assert total.flops == sum(operators.values()) > 0
    parts = [by_name[name] for name, _ in model.named_children()]
    for what in ("parameters", "trainable", "flops", "activations"):
        assert sum(getattr(m, what) for m in parts) == getattr(total, what)
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert by_name["decoder.stages.2"].flops > by_name["decoder.stages.1"].flops > 0


def test_frozen_parameters_are_not_trainable():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model[0].requires_grad_(False)
    (total, *_), operators, _ = model_costs.count(model, (torch.rand(2, 3),))
    assert (total.parameters, total.trainable) == (41, 25)
    assert operators == {"linear": 2 * (12 + 20)} and total.activations == 2 * 9


def test_peak_memory_is_that_of_the_worst_moment():
    class Hungry(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))
            self.tied = self.weight

        def forward(self, x):
            for _ in range(3):
                x = x + 1  # the one before is still there
            return x.sum()

    class Modest(nn.Module):
        def forward(self, x):
            return x[:1000] + 1

    model = nn.Sequential(Modest(), Hungry())
    model[1].register_forward_pre_hook(lambda module, args: (torch.zeros(250_000),))
    found = model_costs.peak_memory(model, torch.zeros(250_000))
    # The weight, Modest's result, zeros, and two of x at a time.
    assert 8_000 + 3_000_000 <= found["1"] == found[""] < 8_000 + 3_000_000 + 10_000
    assert 8_000 <= found["0"] < 8_000 + 10_000
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_two_stage_detectors_find_what_there_is_room_for():
    cfg = get_config("dfvt/mask_rcnn_dfvt_base_1x.py")
    model = model_costs.prepare(cfg, "meta")
    assert model.proposal_generator.nms_thresh == 2.0
    assert model.proposal_generator.post_nms_topk[False] == 1000
    predictor = model.roi_heads.box_predictor
    assert (predictor.test_score_thresh, predictor.test_nms_thresh) == (0.0, 2.0)
    assert predictor.test_topk_per_image == 100
    assert not predictor.soft_nms and not model.proposal_generator.soft_nms


def test_nothing_is_downloaded():
    cfg = get_config("stageinteractor/stageinteractor_timm_convnext_tiny_100q_1x.py")
    assert cfg.model.backbone.bottom_up.pretrained
    model = model_costs.prepare(cfg, "meta")
    assert sum(p.numel() for p in model.backbone.parameters()) > 27e6


def test_published_figures_are_of_configs_that_exist():
    for name, published in analyze_model.PUBLISHED.items():
        assert find_config_file(name)
        assert published and published.keys() <= {"mparams", "gflops"}


def test_one_config_gives_a_table_of_modules_and_json(tmp_path, capsys):
    path = tmp_path / "new" / "costs.json"
    status = analyze_model.main([*ARGUMENTS, "--json", str(path), "--depth", "1"])
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    modules = ["module", "all", "backbone", "initial_queries", "decoder"]
    assert names == [*modules, "config", "stageinteractor/shapes_tiny"]
    (document,) = json.loads(path.read_text())
    assert (document["height"], document["width"]) == (64, 96)
    assert document["modules"][0]["parameters"] == 1_896_776
    peaks = {m["name"]: m["peak_memory"] for m in document["modules"]}
    assert peaks[""] == max(v for v in peaks.values() if v) > 4 * 1_896_776
    assert peaks["backbone"] and peaks["decoder.stages.0"] and peaks["criterion"] is None
    assert document["operators"]["grid_sampler"] > 0


def test_several_configs_give_a_row_each(capsys):
    arguments = [ARGUMENTS[0], SMALL, SMALL, *ARGUMENTS[2:], "--skip-memory"]
    assert analyze_model.main([*arguments, "--opts", "model.decoder.num_stages=3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 3 and lines[1] == lines[2]
    assert lines[1].rstrip("| ").endswith("0") or lines[1].split("|")[-2].strip() == ""


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of Markdown tables by the first one of their row."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


def test_a_network_that_takes_a_tensor_and_its_operators(capsys):
    config = "dfvt/classifier_tiny.py"
    assert analyze_model.main(["--config-file", config, "--size", "224", "224", "--operators"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["dfvt/classifier_tiny"][0] == "3.97"
    assert rows["dfvt/classifier_tiny"][4] == "0.2714"  # what the authors print
    conv, linear = float(rows["conv"][0]), float(rows["linear"][0])
    assert conv + linear == pytest.approx(0.2968, abs=1.5e-4)  # both are rounded
    layers = conv + linear + float(rows["batch_norm"][0]) + float(rows["layer_norm"][0])
    assert float(rows["layers"][0]) == pytest.approx(layers, abs=2e-4)


def test_a_detector_without_data_is_still_given_what_detectors_take():
    costs = model_costs.analyze(
        "common/models/stageinteractor_tiny.py", size=(64, 64), with_memory=False
    )
    assert costs.total.parameters == 1_896_776


def test_output_convolutions_of_dfvt_by_hand():
    backbone = DFvTBackbone(**VARIANTS["tiny"]).eval()
    modules, _, _ = model_costs.count(backbone, (torch.zeros(1, 3, 64, 96),))
    found = [m for m in modules if m.name.endswith(".fuse")]
    assert sum(m.parameters for m in found) == 96_768
    assert modules[0].parameters == 3_680_067
    # 2 C to C channels at strides 4, 8 and 16.
    places = [(64 // s) * (96 // s) for s in (4, 8, 16)]
    assert sum(m.flops for m in found) == sum(n * 2 * c * c for n, c in zip(places, (48, 96, 192)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "no/such.py"], "no/such.py"),
        ([*ARGUMENTS, "--opts", "model.decoder.stages=3"], "model.decoder.num_stages"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, message):
    with pytest.raises(SystemExit, match=message):
        analyze_model.main(arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*ARGUMENTS[:2], "--size", "0", "5"], "--size 0 5: both must be positive"),
        ([*ARGUMENTS, "--depth", "-1"], "--depth -1 must not be negative"),
    ],
)
def test_nonsense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        analyze_model.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err
