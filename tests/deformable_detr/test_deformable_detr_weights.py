"""Names of MMDetection's checkpoints, at the released size."""

from __future__ import annotations

import pytest
import torch
from deformable_detr_weights import CONFIGS, empty_model, random_checkpoint, version_3

from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    convert_official_state_dict,
    convert_to_official,
    is_official_state_dict,
)


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
    with pytest.raises(CheckpointMismatchError, match=r"it is refined \(the model is two-stage\)"):
        convert_official_state_dict(random_checkpoint("refine"), empty_model("two_stage"))
