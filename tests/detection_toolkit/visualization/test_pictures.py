"""Annotated pictures and sheets of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from detection_toolkit.visualization import (
    contact_sheet,
    draw_detections,
    draw_ground_truth,
    save_picture,
    select_confident,
    side_by_side,
)

GREY = np.full((60, 80, 3), 120, np.uint8)


def detections(scores) -> Instances:
    count = len(scores)
    return Instances(
        (60, 80),
        pred_boxes=Boxes(torch.tensor([[10.0, 10.0, 50.0, 40.0]] * count).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.arange(count),
    )


def changed(picture: np.ndarray) -> np.ndarray:
    """Where a drawing on GREY differs from it, at the size of the drawing."""
    return np.abs(picture.astype(int) - 120).max(axis=2) > 60


def test_small_pictures_are_enlarged_and_others_are_not():
    assert draw_detections(GREY, detections([0.9])).shape == (360, 480, 3)
    assert draw_detections(GREY, detections([0.9]), scale=1).shape == (60, 80, 3)
    assert draw_detections(np.zeros((500, 400, 3), np.uint8), detections([])).shape == (500, 400, 3)


def test_the_box_is_drawn_where_it_is():
    drawn = changed(draw_detections(GREY, detections([0.9]), scale=4))
    for y, x in [(40, 120), (160, 120), (100, 40), (100, 200)]:  # middle of each side, times 4
        assert drawn[y - 3 : y + 4, x - 3 : x + 4].any(), (y, x)
    assert not drawn[90:110, 90:150].any()  # within the box
    assert not drawn[:20].any() and not drawn[:, 260:].any()  # outside


def test_without_detections_the_picture_is_unchanged():
    for instances in (detections([]), detections([0.3])):
        drawn = draw_detections(GREY, instances, threshold=0.5, scale=1)
        assert np.array_equal(drawn, GREY)


def test_threshold_is_inclusive():
    assert len(select_confident(detections([0.5, 0.49]), 0.5)) == 1


def test_a_class_has_one_colour_in_detections_and_ground_truth():
    record = {
        "annotations": [{"bbox": [10, 10, 40, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}]
    }
    metadata = Metadata(thing_classes=["circle"])
    truth = draw_ground_truth(record, metadata, image=GREY, scale=4)
    found = draw_detections(GREY, detections([0.9]), metadata, scale=4)
    assert truth[40, 120].tolist() == found[40, 120].tolist() != [120, 120, 120]


def test_ground_truth_without_objects_and_classes_without_names():
    assert np.array_equal(draw_ground_truth({}, image=GREY, scale=1), GREY)
    draw_detections(GREY, detections([0.9] * 9), Metadata(thing_classes=["only one"]))


def test_a_sheet_holds_every_picture_once():
    red, blue = (np.full((30, 40, 3), c, np.uint8) for c in ([255, 0, 0], [0, 0, 255]))
    sheet = contact_sheet([[red, blue], [blue]], ["left", "right: déjà vu"])
    assert (sheet == [255, 0, 0]).all(-1).sum() == red[..., 0].size
    assert (sheet == [0, 0, 255]).all(-1).sum() == 2 * blue[..., 0].size
    row = side_by_side([red, blue])
    assert row.shape[0] < sheet.shape[0] and row.shape[1] == sheet.shape[1]


def test_sheets_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])
    with pytest.raises(ValueError, match="2 columns, but 1 titles"):
        side_by_side([GREY, GREY], ["one"])


def test_pictures_are_saved_in_new_folders(tmp_path):
    path = save_picture(GREY, tmp_path / "new" / "größe 1.png")
    assert np.array_equal(np.asarray(Image.open(path)), GREY)
