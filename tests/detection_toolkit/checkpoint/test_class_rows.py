"""Rows of classes, kept by name."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.class_rows import (
    ClassNames,
    ClassRows,
    find_class_rows,
    keep_known_classes,
    match_classes,
)


class Proposals(nn.Module):
    nameless_classes = ("head",)

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(2, num_classes)


class Detector(nn.Module):
    """A row for each class, four, a column, one row more, and a part without names."""

    def __init__(self, num_classes):
        super().__init__()
        self.classes = nn.Linear(3, num_classes)
        self.boxes = nn.Linear(3, 4 * num_classes)
        self.column = nn.Linear(num_classes, 2, bias=False)
        self.softmax = nn.Linear(3, num_classes + 1, bias=False)
        self.proposals = Proposals(num_classes)
        self.trunk = nn.Linear(3, 3)
        # Neither grows by the same for each class.
        self.register_buffer("pairs", torch.zeros(num_classes, num_classes))
        self.register_buffer("shrinks", torch.zeros(100 - num_classes))


def detector(num_classes, seed=0):
    torch.manual_seed(seed)
    return Detector(num_classes)


def test_rows_are_found_by_comparison():
    assert find_class_rows(Detector, 5) == {
        "classes.weight": ClassRows(0, 1, 0, True),
        "classes.bias": ClassRows(0, 1, 0, True),
        "boxes.weight": ClassRows(0, 4, 0, True),
        "boxes.bias": ClassRows(0, 4, 0, True),
        "column.weight": ClassRows(1, 1, 0, True),
        "softmax.weight": ClassRows(0, 1, 1, True),
        "proposals.head.weight": ClassRows(0, 1, 0, False),
        "proposals.head.bias": ClassRows(0, 1, 0, False),
    }


@pytest.mark.parametrize(
    "now, before, places",
    [
        (["a", "b"], ["b", "a", "c"], [1, 0]),
        (["Traffic Light ", "new"], ["traffic light"], [0, None]),
        (["car", "Car"], ["Car"], [None, 0]),  # the same to the letter goes first
        (["Car", "car"], ["CAR"], [0, None]),  # and each serves once
        (["a", "b"], ["a", "a", "b"], [None, 2]),  # which of the two?
        (["STRASSE"], ["straße"], [0]),
        ([], ["a"], []),
    ],
)
def test_names_are_matched(now, before, places):
    assert match_classes(now, before) == places


NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True)


@given(before=NAMES, now=NAMES)
def test_what_is_known_is_kept_bit_for_bit_and_the_rest_as_initialised(before, now):
    old, new = detector(len(before), seed=1), detector(len(now), seed=2)
    theirs = {k: v.clone() for k, v in old.state_dict().items() if k not in ("pairs", "shrinks")}
    kept = keep_known_classes(theirs, before, new, ClassNames(now, Detector))
    assert kept.keys() == theirs.keys()
    ours = new.state_dict()
    new.load_state_dict(kept, strict=False)
    for i, name in enumerate(now):
        place = before.index(name) if name in before else None
        for key, per_class, axis in (
            ("classes.weight", 1, 0),
            ("classes.bias", 1, 0),
            ("boxes.weight", 4, 0),
            ("boxes.bias", 4, 0),
            ("column.weight", 1, 1),
            ("softmax.weight", 1, 0),
        ):
            source, number = (ours, i) if place is None else (theirs, place)
            expected = source[key].narrow(axis, per_class * number, per_class)
            assert torch.equal(kept[key].narrow(axis, per_class * i, per_class), expected)
    assert torch.equal(kept["softmax.weight"][-1], theirs["softmax.weight"][-1])
    assert torch.equal(kept["trunk.weight"], theirs["trunk.weight"])
    count = min(len(now), len(before))
    assert torch.equal(kept["proposals.head.bias"][:1], theirs["proposals.head.bias"][:1])
    if now != before:
        head = kept["proposals.head.weight"]
        assert torch.equal(head[:count], theirs["proposals.head.weight"][:count])


def load(tmp_path, before, now, caplog, *, strict=False, count=None, half=False):
    """A model after loading a checkpoint of a run with such classes, what it held, and the log."""
    old = detector(count or len(before or now), seed=1)
    weights = {k: v for k, v in old.state_dict().items() if k not in ("pairs", "shrinks")}
    if half:
        weights = {k: v.half() for k, v in weights.items()}
    run = {} if before is None else {"run": {"classes": before}}
    torch.save({"model": weights, **run}, tmp_path / "a.pth")
    new = detector(len(now), seed=2)
    del new.pairs, new.shrinks
    caplog.clear()
    with caplog.at_level(logging.INFO, "detection_toolkit"):
        Checkpointer(new, strict=strict, classes=ClassNames(now, Detector)).load(
            str(tmp_path / "a.pth")
        )
    return new, weights, [r.getMessage() for r in caplog.records if "class" in r.getMessage()]


def test_the_log_says_in_one_line_what_is_kept(tmp_path, caplog):
    new, old, log = load(tmp_path, ["cat", "dog", "nut"], ["bolt", "Dog", "nuts"], caplog)
    assert log == [
        "classes: 1 of 3 keep what the weights (3 classes) know of them (Dog); new: bolt, nuts "
        "(like nut of the weights). If classes are only renamed, train.keep_known_classes=false "
        "takes them by their order"
    ]
    assert torch.equal(new.classes.weight[1], old["classes.weight"][1])
    _, _, log = load(tmp_path, ["a", "b"], ["b", "a"], caplog)
    assert log == ["classes: all 2 are known to the weights and take their rows by name"]
    _, _, log = load(tmp_path, ["a", "b"], ["a", "B"], caplog)
    assert log == ["classes: all 2 are those of the weights"]
    _, _, log = load(tmp_path, ["a", "a", "b"], ["a", "b"], caplog)
    assert log[0].endswith(
        "keep what the weights (3 classes) know of them (b); new: a. "
        "The weights have a more than once"
    )
    _, _, log = load(tmp_path, ["a"], ["b\x1b[2J", "c"], caplog)
    assert "0 of 2" in log[0] and "\x1b" not in log[0]


@pytest.mark.parametrize("before", ["ab", [1, 2], ["a", "b", "c"], [], {"a": 1}])
def test_what_is_no_list_of_the_classes_of_the_rows_is_not_heeded(tmp_path, before, caplog):
    new, old, log = load(tmp_path, before, ["b", "a"], caplog, count=2)
    assert torch.equal(new.classes.weight, old["classes.weight"])  # by their order, as ever
    assert not log or "but have another number of rows" in log[0]


def test_half_precision_becomes_the_models(tmp_path, caplog):
    new, old, _ = load(tmp_path, ["a", "b"], ["b", "a"], caplog, half=True)
    assert new.classes.weight.dtype == torch.float32
    assert torch.equal(new.classes.weight, old["classes.weight"][[1, 0]].float())


def test_a_model_that_is_read_may_have_some_of_the_classes_and_their_order(tmp_path, caplog):
    new, old, log = load(tmp_path, ["a", "b", "c"], ["c", "a"], caplog, strict=True)
    assert torch.equal(new.classes.weight, old["classes.weight"][[2, 0]])
    assert log == ["classes: all 2 are known to the weights and take their rows by name"]
    new, old, log = load(tmp_path, ["a", "b"], ["c", "a"], caplog, strict=True)
    assert torch.equal(new.classes.weight, old["classes.weight"])
    assert "the weights are of the classes a, b, and the data of c, a" in log[0]
    with pytest.raises(ValueError, match="is not of this config"):
        load(tmp_path, ["a", "b", "c"], ["c", "d"], caplog, strict=True)
