"""Names of MMDetection's checkpoints, at the released size."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from torch import Tensor, nn

from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    convert_official_state_dict,
    convert_to_official,
    is_official_state_dict,
)
from detection_toolkit.config import get_config

DATA = Path(__file__).resolve().parents[1] / "data"
CONFIGS = {
    "plain": "deformable_detr/deformable_detr_r50_50e.py",
    "refine": "deformable_detr/deformable_detr_refine_r50_50e.py",
    "two_stage": "deformable_detr/deformable_detr_two_stage_r50_50e.py",
}
# Version 2 -> version 3, in this order.
RENAMED = [
    (r"^bbox_head\.transformer\.(encoder|decoder)\.", r"\1."),
    (r"^(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(decoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"\.ffns\.0\.", ".ffn."),
    (r"^bbox_head\.transformer\.level_embeds$", "level_embed"),
    (r"^bbox_head\.transformer\.reference_points\.", "reference_points_fc."),
    (r"^bbox_head\.transformer\.enc_output\.", "memory_trans_fc."),
    (r"^bbox_head\.transformer\.enc_output_norm\.", "memory_trans_norm."),
    (r"^bbox_head\.transformer\.pos_trans\.", "pos_trans_fc."),
    (r"^bbox_head\.transformer\.pos_trans_norm\.", "pos_trans_norm."),
    (r"^bbox_head\.query_embedding\.", "query_embedding."),
]


def random_checkpoint(variant: str) -> dict[str, Tensor]:
    """Random values for every tensor of the released model; what its stages share is the same."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    with gzip.open(DATA / f"keys_deformable_detr_r50_{variant}.tsv.gz", "rt") as file:
        for line in file:
            if line.startswith("#"):
                continue
            name, shape, dtype, same = line.rstrip("\n").split("\t")
            size = () if shape == "scalar" else tuple(map(int, shape.split("x")))
            if same:
                weights[name] = weights[same]
            elif dtype == "float32":
                weights[name] = torch.randn(size, generator=generator)
            else:
                weights[name] = torch.randint(1000, size, generator=generator)
    return weights


def empty_model(variant: str) -> nn.Module:
    with torch.device("meta"):
        return instantiate(get_config(CONFIGS[variant]).model)


def version_3(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("variant", CONFIGS)
def test_released_checkpoints_round_trip(variant):
    official, model = random_checkpoint(variant), empty_model(variant)
    assert is_official_state_dict(official)
    converted = convert_official_state_dict(official, model, require_unused=True)
    model.load_state_dict(converted.model, strict=True, assign=True)
    back = convert_to_official(model.state_dict(), model, extras=converted.extras)
    assert set(back) == set(official)
    for name, tensor in official.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("variant", CONFIGS)
def test_version_3_names_the_same_tensors(variant):
    official, model = random_checkpoint(variant), empty_model(variant)
    renamed = {version_3(name): tensor for name, tensor in official.items()}
    assert not any("transformer" in name for name in renamed) and is_official_state_dict(renamed)
    expected = convert_official_state_dict(official, model).model
    found = convert_official_state_dict(renamed, model).model
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_weights_of_another_variant_are_refused():
    with pytest.raises(CheckpointMismatchError, match="reference_points"):
        convert_official_state_dict(random_checkpoint("refine"), empty_model("two_stage"))
