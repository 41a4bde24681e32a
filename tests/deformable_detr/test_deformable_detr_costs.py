"""Costs as ``tools/analyze_model.py`` counts them, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from deformable_detr_models import VARIANTS, make_model, small_config
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr import DeformableAttention
from detection_toolkit.modeling import Execution
from detection_toolkit.studies import model_costs
from maps import make_maps


def test_deformable_attention_by_hand():
    channels, heads, points, queries = 16, 2, 3, 5
    sizes = ((4, 6), (2, 3))

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = DeformableAttention(
                channels,
                num_heads=heads,
                num_levels=2,
                num_points=points,
                execution=Execution(sampling="grid"),
            )

        def forward(self, content, references, *levels):
            return self.attention(content, references, make_maps(levels, (8, 16)))

    levels = [torch.rand(1, channels, *size) for size in sizes]
    inputs = (torch.rand(1, queries, channels), torch.rand(1, queries, 2, 2), *levels)
    _, operators, _ = model_costs.count(Attend().eval(), inputs)
    cells = sum(height * width for height, width in sizes)
    samples = heads * 2 * points
    layers = queries * channels * (3 * samples + channels) + cells * channels**2
    assert operators["linear"] == layers
    # Four neighbours of each channel of each point.
    assert operators["grid_sampler"] == 4 * queries * samples * channels // heads


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_is_computed_is_counted_in_its_module(variant):
    config = OmegaConf.create({"model": small_config(variant)}, flags={"allow_objects": True})
    model = model_costs.prepare(config, "cpu")
    inputs = [{"image": torch.zeros(3, 96, 128)}]
    modules, operators, _ = model_costs.count(model, inputs)
    by_name = {module.name: module for module in modules}
    total = by_name[""]
    assert total.parameters == sum(p.numel() for p in make_model(variant).parameters())
    assert total.flops == sum(operators.values()) > 0
    parts = [by_name[name] for name, _ in model.named_children()]
    for what in ("parameters", "flops", "activations"):
        assert sum(getattr(part, what) for part in parts) == getattr(total, what), what
    # The cells' proposals cost something; queries that are learned are one small layer.
    assert (by_name["initial_queries"].flops > 20 * 16 * 16) == (variant == "two_stage")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    beside = {"group_norm", "layer_norm", "grid_sampler", "scaled_dot_product_attention"}
    products = sum(value for name, value in operators.items() if name not in beside)
    assert products == counter.get_total_flops() / 2
