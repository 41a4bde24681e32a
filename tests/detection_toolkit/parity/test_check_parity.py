"""The comparison fails when it must."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from check_parity import general_name, main

from detection_toolkit.parity import Measurement, Settings, check_case
from detection_toolkit.parity.compare import (
    EXACT,
    LOSS,
    PIXELS,
    geometry,
    gradient,
    not_finite,
    value,
)
from detection_toolkit.parity.detector import align_detections, assignment
from detection_toolkit.parity.runner import MAX_SCATTER

DATA = Path(__file__).resolve().parents[2] / "data"

FORWARD, TRAIN = "forward_reuse3", "train_basic"

# In limits: three times as much as a look at rounding accepts, whatever the machine's rounding.
CLEAR = 3 * MAX_SCATTER
VALUE = value(Settings().atol)
NORM = gradient(0.0)


def altered(limit):
    """Moves one element so far beyond its limit that no rounding explains it."""

    def change(array):
        array = array.copy()
        at = array.size // 2
        size = np.linalg.norm(array) if limit.as_norm else np.abs(array.flat[at])
        allowed = limit.absolute + limit.relative * size
        array.flat[at] += 1 if limit.is_exact else CLEAR * allowed
        return array

    return change


def run(path, capsys, *options):
    status = main([str(path), *options])
    output = capsys.readouterr()
    return status, output.out + output.err


ALTERED = {
    FORWARD: {
        "stage4/cls_score": VALUE,
        "stage3/sample_xy": PIXELS,
        "stage3/mix_preln2": VALUE,
        "stage3/level_weights": VALUE,
        "stage5/bank3/S": VALUE,
        "stage2/bank_provenance": EXACT,
        "det/0/labels": EXACT,
        "init/imgs_whwh": EXACT,
    },
    TRAIN: {
        "stage2/img1/assigned_gt": EXACT,
        "stage2/img0/cost_l1": VALUE,
        "stage3/cls_target": EXACT,
        "stage1/loss_iou": LOSS,
        "stage1/avg_factor_cls": EXACT,
        "stage0/pos_acc": EXACT,
        "total_loss": LOSS,
        "gradnorm/roi_head.bbox_head.4.fc_reg.weight": NORM,
        "grad/roi_head.bbox_head.4.fc_cls.bias": NORM,
        "gradnorm_input/feat2": NORM,
    },
    "assigner_cases_16": {"case3/stage2/cls_target": EXACT},
    "backbone_swin_narrow": {"neck/2": VALUE, "backbone/1": VALUE},
    "adamixer_train_one_empty_image": {"stage1/reg_target": EXACT, "grad_norm/values": NORM},
    "adamixer_forward_padded_batch": {"stage3/S": VALUE},
}


@pytest.mark.parametrize("case", ALTERED)
def test_every_altered_reference_is_noticed_and_nothing_else(case, edited_case, capsys):
    """All at once: the network is run once, and each quantity is compared on its own."""
    limits = ALTERED[case]
    changes = {name: altered(limit) for name, limit in limits.items()}
    status, text = run(edited_case(case, **changes), capsys)
    assert status == 1
    failing = [line.split()[1] for line in text.splitlines() if "FAIL" in line]
    # An array of the lengths of all gradients is compared by parameter.
    failing = ["grad_norm/values" if x.startswith("grad_norm/") else x for x in failing]
    assert sorted(failing) == sorted(limits)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (FORWARD, "weight/roi_head.bbox_head.3.dynamic_conv.M_score_list.weight"),
        (FORWARD, "feat/1"),
        (TRAIN, "weight/roi_head.bbox_head.2.iof_tau"),
        ("backbone_swin_narrow", "weight/backbone.stages.0.downsample.reduction.weight"),
    ],
)
def test_an_altered_input_is_noticed(case, name, edited_case, capsys):
    status, text = run(edited_case(case, **{name: lambda array: array * 1.1}), capsys)
    assert status == 1
    assert "FAIL" in text


@pytest.mark.parametrize(
    ("case", "name", "said"),
    [
        (FORWARD, "feat/2", "feat/2"),
        (FORWARD, "image_sizes", "image_sizes"),
        (FORWARD, "stage3/level_weights", "stage3/level_weights"),
        (FORWARD, "stage3/mix_preln2", "stage3/mix_preln2"),
        (FORWARD, "stage4/bank2/M", "stage4/bank2/M"),
        (FORWARD, "weight/roi_head.bbox_head.1.fc_reg.bias", "roi_head.bbox_head.1.fc_reg.bias"),
        (FORWARD, "weight/rpn_head.init_proposal_bboxes", "rpn_head.init_proposal_bboxes"),
        (FORWARD, "config", "config"),
        (TRAIN, "gt/1/labels", "gt/1/labels"),
        (TRAIN, "stage4/cls_target", "stage4/cls_target"),
        (TRAIN, "gradnorm/roi_head.bbox_head.2.fc_cls.bias", "gradnorm/roi_head.bbox_head.2"),
        (TRAIN, "total_loss", "total_loss"),
        ("assigner_cases_16", "num_cases", "num_cases"),
        ("assigner_cases_16", "case7/stage1/boxes", "case7/stage1/boxes"),
        ("backbone_swin_narrow", "image", "image"),
        ("backbone_swin_narrow", "weight/neck.gn_out.bias", "neck.gn_out.bias"),
        ("adamixer_forward_padded_batch", "stage0/sample_xyz", "stage0/sample_xyz"),
        ("adamixer_train_one_empty_image", "grad_norm/values", "grad_norm/values"),
    ],
)
def test_a_missing_array_is_named(case, name, said, edited_case, capsys):
    status, text = run(edited_case(case, **{name: None}), capsys)
    assert status == 1
    assert "error:" in text and said in text.split("error:")[1]


def test_an_unknown_array_is_not_passed_over(edited_case, capsys):
    status, text = run(edited_case(FORWARD, **{"stage1/secret": np.zeros(3)}), capsys)
    assert status == 1
    assert "stage1/secret" in text and "not compared" in text


def test_unknown_arrays_among_known_ones_are_not_passed_over(edited_case, capsys):
    names = ["gradnorm/secret", "gt/2/boxes", "stage1/img2/cost_l1", "feat/9"]
    status, text = run(edited_case(TRAIN, **{name: np.zeros(3, "f4") for name in names}), capsys)
    assert status == 1
    lines = [line for line in text.splitlines() if "FAIL" in line]
    assert sorted(line.split()[1] for line in lines) == sorted(names)
    assert all("not compared" in line for line in lines)


def test_the_attentions_tau_has_a_wider_limit_of_its_own():
    rows = {row.quantity: row for row in check_case(DATA / f"{TRAIN}.npz", Settings()).rows}
    assert rows["gradnorm/roi_head.bbox_head.1.iof_tau"].limit == "0.01 rel"
    assert rows["gradnorm/roi_head.bbox_head.1.fc_reg.weight"].limit == "0.002 rel"


def test_a_surplus_weight_is_named(edited_case, capsys):
    name = "weight/roi_head.bbox_head.0.extra.weight"
    status, text = run(edited_case(FORWARD, **{name: np.zeros(3, "f4")}), capsys)
    assert status == 1
    assert "surplus: roi_head.bbox_head.0.extra.weight" in text


def test_a_config_without_an_entry_is_named(edited_case, capsys):
    def without_groups(array):
        config = json.loads(bytes(array))
        del config["summary"]["groups"]
        return np.frombuffer(json.dumps(config).encode(), np.uint8)

    status, text = run(edited_case(FORWARD, config=without_groups), capsys)
    assert status == 1
    assert "'groups'" in text


def test_a_config_of_other_sizes_is_an_error(edited_case, capsys):
    def other_classes(array):
        config = json.loads(bytes(array))
        config["summary"]["num_classes"] += 1
        return np.frombuffer(json.dumps(config).encode(), np.uint8)

    status, text = run(edited_case(FORWARD, config=other_classes), capsys)
    assert status == 1
    assert "wrong shape" in text and "fc_cls" in text


def test_a_feature_map_of_the_wrong_width_is_an_error(edited_case, capsys):
    path = edited_case(FORWARD, **{"feat/1": lambda array: array[:, :-3]})
    status, text = run(path, capsys)
    assert status == 1
    assert "cannot be computed" in text


def test_damaged_and_foreign_files(tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes((DATA / f"{FORWARD}.npz").read_bytes()[:50_000])
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, a=np.zeros(2))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, config=np.array([{"a": 1}], dtype=object))
    for path, said in (
        (broken, "no readable .npz"),
        (foreign, "none of the known layouts"),
        (pickled, "no readable .npz"),
        (tmp_path / "nowhere.npz", "no such case"),
    ):
        status, text = run(path, capsys)
        assert status == 1
        assert str(path) in text and said in text


def test_every_package_brings_the_kinds_of_its_cases(tmp_path, capsys):
    np.savez(tmp_path / "foreign.npz", a=np.zeros(2))
    _, text = run(tmp_path / "foreign.npz", capsys)
    known = set(text.split("layouts (")[1].split(")")[0].split(", "))
    methods = {"StageInteractor", "cross-stage assigner", "AdaMixer", "AdaMixer with SQR", "DFvT"}
    assert known >= methods | {"backbone"}


def test_other_cases_are_still_checked_after_a_damaged_one(tmp_path, capsys):
    status = main([str(tmp_path / "nowhere.npz"), str(DATA / "assigner_cases_16.npz"), "--summary"])
    text = capsys.readouterr().out
    assert status == 1
    assert "1 cases" in text and "1 files unusable" in text


def test_atol_is_the_limit_of_values(edited_case, capsys):
    path = edited_case(FORWARD, **{"stage5/cls_score": altered(VALUE)})
    assert run(path, capsys)[0] == 1
    assert run(path, capsys, "--atol", "1e-2")[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--atol", "0"],
        ["--device", "nonsense"],
        ["--autocast", "bfloat16", "--dtype", "float64"],
    ],
)
def test_bad_options(options):
    with pytest.raises(SystemExit) as stop:
        main([str(DATA / f"{FORWARD}.npz"), *options])
    assert stop.value.code != 0


def test_infinite_reference_losses_only_ask_for_finite_ones(edited_case, capsys):
    """Without any object the reference divides by zero."""
    path = edited_case(
        TRAIN,
        **{
            "stage0/loss_cls": np.float32(np.inf),
            "total_loss": np.float32(np.inf),
            "gradnorm/roi_head.bbox_head.0.fc_cls.bias": np.float32(np.nan),
            "gradnorm/roi_head.bbox_head.0.fc_cls.weight": np.float32(np.inf),
        },
    )
    report = check_case(path, Settings())
    rows = {row.quantity: row for row in report.rows}
    for name in ("stage0/loss_cls", "total_loss", "gradnorm/roi_head.bbox_head.0.fc_cls.bias"):
        assert rows[name].verdict == "ok (reference not finite, ours finite)"
    # Everything else is compared as ever.
    assert rows["stage1/loss_cls"].verdict == "ok"
    assert not_finite(np.array(np.nan), np.array(np.inf)).startswith("FAIL")
    assert not_finite(np.array(1.0), np.array(1.0)) == ""


def test_a_tie_is_judged_by_its_total_cost():
    cost = np.array([[1.0, 1.0], [1.0, 1.0], [5.0, 9.0]])
    tie = assignment(torch.tensor([1, 0, -1]), np.array([0, 1, -1]), cost, 1e-4)
    assert tie.startswith("ok (tie: total cost 2")
    worse = assignment(torch.tensor([0, -1, 1]), np.array([0, 1, -1]), cost, 1e-4)
    assert worse.startswith("FAIL total cost 10")
    fewer = assignment(torch.tensor([0, -1, -1]), np.array([0, 1, -1]), cost, 1e-4)
    assert fewer == ""  # left to the comparison, which fails
    assert assignment(torch.tensor([0, 1, -1]), np.array([0, 1, -1]), cost, 1e-4) == ""


def test_detections_of_equal_score_may_swap_and_others_may_not():
    boxes = np.arange(12.0).reshape(3, 4)
    reference = (np.array([0.9, 0.5, 0.5]), np.array([1, 2, 3]), boxes)
    ours = (np.array([0.9, 0.5, 0.5]), np.array([1, 3, 2]), boxes[[0, 2, 1]])
    assert align_detections(ours, reference).tolist() == [0, 2, 1]
    apart = (np.array([0.9, 0.6, 0.5]), *ours[1:])
    assert align_detections(apart, reference).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("limit", "difference", "ok"),
    [
        (value(1e-4), 0.9e-4, True),
        (value(1e-4), 1.1e-4, False),
        (LOSS, 0.9e-3, True),  # of 100
        (LOSS, 1.1e-3, False),
        (EXACT, 1e-9, False),
        (EXACT, 0.0, True),
        (gradient(1e3), 0.19, True),
        (gradient(1e3), 0.21, False),
        (gradient(1e3, 1e-2), 0.9, True),
        (gradient(1e9), 100.0, True),  # short against the longest gradient
    ],
)
def test_limits(limit, difference, ok):
    row = Measurement("x", np.array(100.0 + difference), np.array(100.0), limit).row()
    assert row.ok is ok
    assert np.isclose(row.max_abs, difference)


def test_geometry_has_a_limit_for_pixels_and_one_for_logarithms():
    reference = np.zeros((3, 4))
    for column, ok in ((0, True), (1, True), (2, False), (3, False)):
        ours = reference.copy()
        ours[1, column] = 1e-3
        assert Measurement("x", ours, reference, geometry(1e-4, 2)).row().ok is ok


def test_what_cannot_be_compared_fails():
    reference = np.zeros(3)
    assert not Measurement("x", np.zeros(4), reference, value(1.0)).row().ok
    assert not Measurement("x", np.array([0, np.nan, 0]), reference, value(1.0)).row().ok
    assert not Measurement("x", reference, np.array([0, np.nan, 0]), value(1.0)).row().ok


def test_general_names():
    assert general_name("stage3/img0/cost_l1") == "stage*/img*/cost_l1"
    assert general_name("stage3/bank2/M") == "stage*/bank*/M"
    assert general_name("gradnorm/roi_head.bbox_head.0.fc_cls.bias") == "gradnorm/*"
    assert general_name("grad/roi_head.bbox_head.0.iof_tau") == "grad/*iof_tau"
