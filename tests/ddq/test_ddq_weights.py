"""Names of MMDetection's checkpoints of DDQ: HPR's on it, without what HPR adds."""

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
    official_file,
)
from detection_toolkit.checkpoint.official_format import format_of_official
from detection_toolkit.config import apply_overrides, get_config

KEYS = Path(__file__).resolve().parents[1] / "data" / "keys_hpr_ddq_r50.tsv.gz"
OF_HPR = re.compile(
    r"bbox_head_aux\..*|decoder\.norm_aux\..*|.*\.merger_\w+\..*"
    r"|decoder\.layers\.\d+\.(dyconv|ca)_.*|decoder\.layers\.\d+\.(dy_conv|regional_ca)\..*"
)


def random_checkpoint() -> dict[str, Tensor]:
    generator, weights = torch.Generator().manual_seed(0), {}
    with gzip.open(KEYS, "rt") as file:
        for line in file:
            if line.startswith(("#", "name\t")) or OF_HPR.match(line.split("\t")[0]):
                continue
            name, shape = line.rstrip("\n").split("\t")
            sizes = [] if shape == "scalar" else [int(x) for x in shape.split("x")]
            weights[name] = torch.rand(sizes, generator=generator)
    return weights


def empty_model(*overrides: str) -> nn.Module:
    config = apply_overrides(get_config("ddq/ddq_r50_12e.py"), overrides)
    with torch.device("meta"):
        return instantiate(config.model)


def test_checkpoints_round_trip():
    official, model = random_checkpoint(), empty_model()
    assert format_of_official(official).name == "DDQ"
    converted = convert_official_state_dict(official, model)
    model.load_state_dict(converted.model, strict=True, assign=True)
    back = convert_to_official(model.state_dict(), model, extras=converted.extras)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], x) for name, x in official.items())
    assert official_file(converted.model, model)["state_dict"].keys() <= official.keys()


def test_heads_are_where_they_are_used():
    official, model = random_checkpoint(), empty_model()
    ours = convert_official_state_dict(official, model).model
    for name, theirs in (
        ("decoder.stages.2.head.box.4.bias", "bbox_head.reg_branches.2.4.bias"),
        ("decoder.dense_heads.2.box.4.bias", "bbox_head.aux_reg_branches.2.4.bias"),
        ("initial_queries.head.classes.bias", "bbox_head.cls_branches.6.bias"),
        ("initial_queries.dense_head.classes.bias", "bbox_head.cls_branches.7.bias"),
        ("initial_queries.content.weight", "query_map.weight"),
    ):
        assert torch.equal(ours[name], official[theirs])


def test_a_second_listing_of_the_dense_heads_is_known():
    """As checkpoints have it after a step of training."""
    official, model = random_checkpoint(), empty_model()
    expected = convert_official_state_dict(official, model).model
    for name in [x for x in official if x.startswith("bbox_head.aux_reg_branches.")]:
        official["decoder." + name.removeprefix("bbox_head.")] = official[name]
    found = convert_official_state_dict(official, model).model
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    name = "decoder.aux_reg_branches.3.0.bias"
    official[name] = official[name] + 1
    with pytest.raises(CheckpointMismatchError, match="which it repeats"):
        convert_official_state_dict(official, model)


def test_settings_that_no_weight_tells_are_asked_for():
    model = empty_model("model.encoder.position_temperature=10000")
    with pytest.raises(CheckpointMismatchError, match="position_temperature=20"):
        convert_official_state_dict(random_checkpoint(), model)


def test_weights_of_another_detector_are_refused():
    with torch.device("meta"):
        model = instantiate(get_config("dino/dino_mmdet_r50_4scale_12e.py").model)
    with pytest.raises(CheckpointMismatchError, match="choose a config of ddq"):
        convert_official_state_dict(random_checkpoint(), model)
