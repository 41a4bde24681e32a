"""Curves from Detectron2's metrics file."""

from __future__ import annotations

import itertools
import json

import cv2
import numpy as np
import pytest

from detection_toolkit.visualization import (
    plot_ap_curves,
    plot_convergence,
    plot_loss_curves,
    read_metrics,
)


def record(iteration: int, **values: float) -> dict:
    losses = {f"stage{t}/{k}": 1.0 + t for k in ("cls", "bbox", "giou") for t in range(2)}
    losses |= {f"loss_{k}": 3.0 for k in ("cls", "bbox", "giou")}
    accuracy = {"stage0/matched_accuracy": 50.0}
    return {"iteration": iteration, "total_loss": 9.0, "lr": 1e-4, **losses, **accuracy, **values}


def write(path, records, tail: str = "") -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return str(path)


def test_series_are_ordered_and_a_resumed_iteration_counts_once(tmp_path):
    file = write(
        tmp_path / "metrics.json",
        [record(19), record(39), record(59), record(39, total_loss=4.0, **{"bbox/AP": 12.5})],
    )
    series = read_metrics(file)
    iterations, losses = series["total_loss"]
    assert iterations.tolist() == [19, 39, 59]
    assert losses.tolist() == [9.0, 4.0, 9.0]
    assert [x.tolist() for x in series["bbox/AP"]] == [[39], [12.5]]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    file = write(tmp_path / "metrics.json", [record(19)], tail='{"iteration": 39, "total_l')
    assert read_metrics(file)["total_loss"][0].tolist() == [19]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text('{"iteration": 1, "total_loss": 2}\nnonsense\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match="metrics.json: line 2 is not JSON of metrics"):
        read_metrics(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        plot_loss_curves(tmp_path / "nowhere.json", tmp_path / "loss.png")


@pytest.mark.parametrize("steps", [1, 3, 60])
def test_loss_curves_are_drawn_in_new_folders(tmp_path, steps):
    records = [record(20 * i + 19, total_loss=9.0 / (i + 1)) for i in range(steps)]
    records[-1]["stage1/cls"] = float("nan")  # Detectron2 writes NaN as it is
    file = write(tmp_path / "metrics.json", records)
    output = plot_loss_curves(file, tmp_path / "new" / "loss.png")
    picture = cv2.imread(output)
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture.std() > 5  # not blank


def test_the_loss_on_the_test_set_is_drawn_beside_that_of_training(tmp_path):
    records = [record(20 * i + 19, total_loss=9.0 / (i + 1)) for i in range(3)]
    pictures = []
    of_stages = {f"validation/stage{t}/{kind}": 2.0 for t in (0, 1) for kind in ("cls", "giou")}
    for values in ({}, {"validation/total": 8.0}, of_stages):
        records[-1].update(values)
        file = write(tmp_path / "metrics.json", records)
        pictures.append(cv2.imread(plot_loss_curves(file, tmp_path / "loss.png")))
    for picture, richer in itertools.pairwise(pictures):
        assert picture.shape == richer.shape and (picture != richer).any()


def test_curves_of_nothing_are_refused(tmp_path):
    file = write(tmp_path / "metrics.json", [{"iteration": 5, "lr": 0.1}])
    with pytest.raises(ValueError, match="no total_loss"):
        plot_loss_curves(file, tmp_path / "loss.png")
    with pytest.raises(ValueError, match="train.eval_period"):
        plot_ap_curves(file, tmp_path / "ap.png")


def test_ap_curves_begin_at_the_start_value(tmp_path):
    file = write(tmp_path / "metrics.json", [record(99, **{"bbox/AP": 40.0, "bbox/AP50": 60.0})])
    without = cv2.imread(plot_ap_curves(file, tmp_path / "a.png"))
    with_start = cv2.imread(plot_ap_curves(file, tmp_path / "b.png", {"AP": 20.0}))
    assert without.shape == with_start.shape
    assert np.abs(without.astype(int) - with_start).max() > 50


def test_convergence_is_drawn_for_every_variant(tmp_path):
    curves = {
        "neither": [[(10, 1.0), (20, 4.0)], [(10, 2.0), (20, 5.0)]],
        "both": [[(10, 3.0), (15, 9.0), (20, 8.0)], [(10, 3.5), (20, float("nan"))]],
        "nothing yet": [],
    }
    picture = plot_convergence(curves, tmp_path / "new" / "convergence.png", title="AP")
    assert cv2.imread(picture).std() > 5
    for extension in ("pdf", "svg"):
        assert plot_convergence(curves, tmp_path / f"convergence.{extension}").endswith(extension)
        assert (tmp_path / f"convergence.{extension}").stat().st_size > 2000


def test_convergence_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no finished training"):
        plot_convergence({"a": [], "b": [[(1, float("nan"))]]}, tmp_path / "convergence.png")
    assert not (tmp_path / "convergence.png").exists()
