"""Weights are found whoever has wrapped them, and those that do not fit are told."""

import argparse
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detection_toolkit.checkpoint.checkpointer import Checkpointer, inference_weights
from detection_toolkit.checkpoint.hub import local_file
from detection_toolkit.checkpoint.official import CheckpointMismatchError
from detection_toolkit.checkpoint.official_files import CheckpointFileError, read_checkpoint
from detection_toolkit.checkpoint.weights import find_weights
from detection_toolkit.engine.shipped import shipped_checkpoint

WEIGHTS = {
    "backbone.weight": torch.ones(2, 3),
    "backbone.bias": torch.ones(2),
    "decoder.weight": torch.full((4, 2), 2.0),
}


class Model(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.backbone = nn.Linear(3, 2)
        self.decoder = nn.Linear(2, classes, bias=False)


def prefixed(prefix, weights=WEIGHTS):
    return {prefix + name: value for name, value in weights.items()}


def same(found, expected=WEIGHTS):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.model."]
)
@pytest.mark.parametrize(
    "wrappers",
    [
        (),
        ("model",),
        ("state_dict",),
        ("model_state_dict",),
        ("state_dict", "model"),
        ("model", "state_dict", "module"),
        ("ema",),
        ("ema", "module"),
    ],
)
def test_wrappers_and_prefixes_are_taken_off_in_any_nesting(wrappers, prefix, known):
    checkpoint = prefixed(prefix)
    for key in reversed(wrappers):
        checkpoint = {"epoch": 3, "note": "text", key: checkpoint}
    found = find_weights(checkpoint, WEIGHTS if known else ())
    assert same(found.any)
    assert (found.plain is None) == ("ema" in wrappers)


def test_parts_that_were_compiled_have_their_names_too():
    names = {"backbone._orig_mod.weight": torch.ones(1), "_orig_mod.decoder.bias": torch.ones(1)}
    assert find_weights(names).plain.keys() == {"backbone.weight", "decoder.bias"}


def test_what_stands_beside_the_model_keeps_its_name():
    beside = {f"teacher.{i}": torch.zeros(1) for i in range(9)}
    found = find_weights({"state_dict": {**prefixed("model."), **beside}}, WEIGHTS).plain
    assert same(found, {**WEIGHTS, **beside})


def test_a_prefix_of_the_model_itself_stays():
    own = prefixed("model.")
    assert same(find_weights({"model": own}, own).plain, own)


def test_averaged_weights_stand_beside_the_plain_ones():
    averaged = {name: value + 1 for name, value in WEIGHTS.items()}
    counted = {"n_averaged": torch.tensor(7), **prefixed("module.", averaged)}
    checkpoint = {"model": WEIGHTS, "ema": counted, "iteration": 3}
    assert same(inference_weights(checkpoint, prefer_ema=False))
    assert same(inference_weights(checkpoint), averaged)
    of_others = {"model": WEIGHTS, "ema": {"module": averaged, "updates": 3}}
    assert same(inference_weights(of_others), averaged)


@pytest.mark.parametrize("prefer_ema", [False, True])
def test_averaged_weights_alone_are_loaded_and_called_so(prefer_ema, tmp_path):
    torch.save({"ema": {"module": WEIGHTS}}, tmp_path / "a.pth")
    model = Model()
    checkpointer = Checkpointer(model, prefer_ema=prefer_ema, strict=True)
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.loaded_ema and same(model.state_dict())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, {"model": {"state_dict": 1}}])
def test_a_file_without_weights_is_refused(content, strict, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointFileError, match=r"a\.pth holds no weights"):
        Checkpointer(Model(), strict=strict).load(str(tmp_path / "a.pth"))


def test_a_file_that_holds_itself_ends():
    checkpoint = {}
    checkpoint["model"] = checkpoint
    assert find_weights(checkpoint).any is None


@pytest.mark.parametrize(
    ("weights", "model", "said"),
    [
        (
            {k: v for k, v in WEIGHTS.items() if k != "backbone.bias"},
            Model(),
            "1 missing: backbone",
        ),
        (WEIGHTS, Model(classes=5), r"decoder.weight \(4x2 in the file, 5x2 in the model\)"),
        (
            {**WEIGHTS, "decoder.stages.7": torch.ones(1)},
            Model(),
            "that the model lacks: decoder.st",
        ),
    ],
)
def test_whoever_reads_a_model_refuses_what_a_run_may_begin_with(
    weights, model, said, tmp_path, caplog
):
    path = str(tmp_path / "a.pth")
    torch.save(weights, path)
    with pytest.raises(CheckpointMismatchError, match=said) as error:
        Checkpointer(model, strict=True).load(path)
    assert "--allow-partial" in str(error.value) and "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        Checkpointer(model).load(path)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "of the model's 3 tensors" in record.getMessage()


def test_what_stands_beside_a_model_does_not_keep_it_from_being_read(tmp_path):
    torch.save({**WEIGHTS, "criterion.weight": torch.ones(1)}, tmp_path / "a.pth")
    model = Model()
    Checkpointer(model, strict=True).load(str(tmp_path / "a.pth"))
    assert same(model.state_dict())


def test_weights_of_which_nothing_fits_begin_no_run(tmp_path):
    torch.save(prefixed("net."), tmp_path / "a.pth")
    with pytest.raises(CheckpointMismatchError, match="no tensor of checkpoint .* is one of the"):
        Checkpointer(Model()).load(str(tmp_path / "a.pth"))


def test_no_file_at_all_is_refused_where_a_model_is_only_read():
    with pytest.raises(CheckpointMismatchError, match="no weights: name a checkpoint"):
        Checkpointer(Model(), strict=True).load("")
    assert Checkpointer(Model()).load("") == {}


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_the_arguments_of_a_script_are_read_without_running_code(tmp_path):
    args = argparse.Namespace(lr=1e-4, coco_path="/data", nested=argparse.Namespace(epochs=12))
    torch.save({"model": WEIGHTS, "args": args}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["args"] == args
    model = Model()
    Checkpointer(model, allow_pickle=True, strict=True).load(str(tmp_path / "a.pth"))
    assert same(model.state_dict())
    mark = tmp_path / "mark"
    args.nested = Trap(mark)
    torch.save({"model": WEIGHTS, "args": args}, tmp_path / "b.pth")
    with pytest.raises(CheckpointFileError, match="train.allow_pickle=true"):
        Checkpointer(Model()).load(str(tmp_path / "b.pth"))
    assert not mark.exists()
    Checkpointer(Model(), allow_pickle=True).load(str(tmp_path / "b.pth"))
    assert mark.exists()  # it was asked for


def test_the_histories_of_mmengine_are_left_out_without_that_package(tmp_path, monkeypatch):
    """Its checkpoints hold them among their notes, with methods that are pickled by ``getattr``."""
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        module = sys.modules[names[-1]]
        code = (
            "class HistoryBuffer:\n"
            "    def __init__(self):\n"
            "        self.log = numpy.ones(3)\n"
            "        self.methods = {'mean': self.mean}\n"
            "    def mean(self):\n"
            "        return self.log.mean()\n"
        )
        module.__dict__["numpy"] = np
        exec(code, module.__dict__)
        hub = {"log_scalars": {"train/loss": module.HistoryBuffer()}}
        content = {"meta": {"epoch": 12}, "state_dict": WEIGHTS, "message_hub": hub}
        torch.save(content, tmp_path / "a.pth")
    model = Model()
    Checkpointer(model, strict=True).load(str(tmp_path / "a.pth"))
    assert same(model.state_dict())


def test_packaged_checkpoints_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Path(local_file("checkpoints/shapes_tiny.pth"))
    assert found == Path(shipped_checkpoint()) and found.is_absolute()
    assert local_file("checkpoints/no_such.pth") == "checkpoints/no_such.pth"
    assert local_file("shapes_tiny.pth") == "shapes_tiny.pth"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "shapes_tiny.pth").touch()  # the user's own goes first
    assert local_file("checkpoints/shapes_tiny.pth") == "checkpoints/shapes_tiny.pth"
