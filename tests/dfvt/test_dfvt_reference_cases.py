"""The committed reference cases through the command line, and that it notices differences."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from check_parity import main
from dfvt_cases import DATA

from detection_toolkit.parity import Settings
from detection_toolkit.parity.runner import MAX_SCATTER

CASES = ("cls_mini_224", "det_mini_128x160", "det_mini_train_64x96")
# In limits: three times as much as a look at rounding accepts, whatever the machine's rounding.
CLEAR = 3 * MAX_SCATTER
MAPS, LOGITS, GRADIENTS = Settings().atol, 1e-5, 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_case_agrees(name, dtype, capsys):
    status = main([str(DATA / f"{name}.npz"), "--dtype", dtype])
    table = capsys.readouterr().out
    assert status == 0, table
    assert "0 out of tolerance" in table
    # How float32 rounds is the machine's affair; float64 needs no closer look on any.
    assert dtype == "float32" or "(0 of them after a look at rounding)" in table


def test_training_case_compares_gradients_and_batch_norms(capsys):
    main([str(DATA / "det_mini_train_64x96.npz")])
    quantities = {line.split()[1] for line in capsys.readouterr().out.splitlines()[1:-1]}
    assert {"out3", "loss", "grad_image", "grad_l2", "grad_sum"} <= quantities
    assert sum(q.startswith("grad/") for q in quantities) == 15
    assert sum(q.startswith("after/") for q in quantities) == 56


@pytest.mark.parametrize(
    ("name", "array", "limit"),
    [
        ("cls_mini_224", "logits", LOGITS),
        ("det_mini_128x160", "out2", MAPS),
        ("det_mini_train_64x96", "loss", LOGITS),
        ("det_mini_train_64x96", "grad_l2", GRADIENTS),
        ("det_mini_train_64x96", "after/patch_embed.norm.running_var", MAPS),
    ],
)
def test_altered_value_is_noticed(name, array, limit, tmp_path, capsys):
    with np.load(DATA / f"{name}.npz") as archive:
        arrays = {key: archive[key].copy() for key in archive.files}
    scale = arrays[array].flat[0] if limit == GRADIENTS else 1.0  # theirs is relative
    arrays[array].flat[0] += CLEAR * limit * scale
    np.savez(tmp_path / f"{name}.npz", **arrays)
    shutil.copy(DATA / "weights_mini.npz", tmp_path)
    assert main([str(tmp_path / f"{name}.npz")]) == 1
    failing = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert [line.split()[1] for line in failing] == [array]


def test_missing_weights_are_named(tmp_path, capsys):
    shutil.copy(DATA / "cls_mini_224.npz", tmp_path)
    assert main([str(tmp_path / "cls_mini_224.npz")]) == 1
    assert str(tmp_path / "weights_mini.npz") in capsys.readouterr().err
