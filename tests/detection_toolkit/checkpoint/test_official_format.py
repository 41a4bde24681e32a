"""The list of official formats: who is in it, and what an entry of one's own brings."""

from __future__ import annotations

import sys

import patience
import pytest
import torch
from torch import nn

from detection_toolkit.checkpoint import official_format
from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.name_rules import Rule
from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    convert_to_official,
    is_official_state_dict,
)
from detection_toolkit.checkpoint.official_format import (
    OfficialFormat,
    official_formats,
    register_official_format,
)


def test_all_projects_are_asked_whichever_is_imported():
    code = (
        "from detection_toolkit.checkpoint.official_format import official_formats\n"
        "print(*(f.name for f in official_formats()), sep=',')"
    )
    run = patience.run([sys.executable, "-c", code], check=True)
    assert (
        run.stdout.strip()
        == "AdaMixer,DDQ,DFvT,DINO,Deformable DETR,HPR,HPR on DDQ,StageInteractor"
    )


@pytest.fixture
def own_format(monkeypatch):
    """A format whose network has one linear layer, with its weight transposed."""
    official_formats()  # before the list is replaced, which the projects enter once
    monkeypatch.setattr(official_format, "_FORMATS", dict(official_format._FORMATS))
    made = OfficialFormat(
        "Own",
        [
            Rule("theirs.{i}.weight", "{i}.weight", torch.t, torch.t),
            Rule("theirs.{i}.*", "{i}.*"),
        ],
        mark=r"theirs\..*",
        our_mark=r"\d\.weight",
        unused=["spare"],
        initial_unused=lambda weights: {"spare": torch.zeros(2)},
        resizable=r"0\..*",
    )
    register_official_format(made)
    return made


def test_a_registered_format_is_an_initial_checkpoint_and_has_a_way_back(own_format, tmp_path):
    official = {
        "module.theirs.0.weight": torch.rand(3, 2),
        "module.theirs.0.bias": torch.rand(2),
        "module.spare": torch.ones(2),
    }
    assert is_official_state_dict(official)
    torch.save({"state_dict": official}, tmp_path / "official.pth")
    model = nn.Sequential(nn.Linear(3, 2))
    Checkpointer(model).load(str(tmp_path / "official.pth"))
    assert torch.equal(model[0].weight, official["module.theirs.0.weight"].T)

    back = convert_to_official(model.state_dict(), model, extras={"spare": torch.ones(2)})
    assert {f"module.{name}" for name in back} == set(official)
    assert all(torch.equal(value, official[f"module.{name}"]) for name, value in back.items())
    assert not convert_to_official(model.state_dict(), model)["spare"].any()


def test_only_what_is_resizable_may_have_another_shape(own_format):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    official = own_format.convert_back(model.state_dict(), model)
    official["theirs.0.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointMismatchError, match=r"theirs\.0\.bias \(our 0\.bias\) is \(5,\)"):
        own_format.convert(official, model)
    assert own_format.convert(official, model, allow_other_sizes=True).model["0.bias"].shape == (5,)
    official["theirs.1.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointMismatchError, match=r"1 of the wrong shape: theirs\.1\.bias"):
        own_format.convert(official, model, allow_other_sizes=True)


def test_a_name_is_registered_once(own_format):
    with pytest.raises(ValueError, match="weights of Own are registered already"):
        register_official_format(own_format)


def test_backbone_and_neck_alone_are_read_by_the_format_that_knows_most_of_their_names(monkeypatch):
    """Whichever was imported first."""

    def made(name, *rules):
        return OfficialFormat(name, rules, mark="never", our_mark="never")

    convolution = Rule("backbone.conv.*", "backbone.conv.*")
    formats = [
        made("A", Rule("head.*", "head.*")),
        made("B", convolution, Rule("neck.*", "neck.*")),
        made("C", convolution),
    ]
    for order in (formats, formats[::-1]):
        monkeypatch.setattr(official_format, "_FORMATS", {f.name: f for f in order})
        found = official_format.format_of_official(["backbone.conv.weight", "neck.weight"])
        assert found.name == "B"
