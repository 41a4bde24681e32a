"""Labels cover neither one another nor the edge, and the most important ones are there."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detection_toolkit.visualization import draw_detections, labels
from detection_toolkit.visualization.labels import BoxLabel, place_labels

WIDTH, HEIGHT = 200, 120


def make_axis():
    figure = Figure(figsize=(WIDTH / 50, HEIGHT / 50), dpi=100)  # two dots for a pixel
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, WIDTH)
    axis.set_ylim(HEIGHT, 0)
    return axis


def areas(texts):
    """(D, 4) of the texts that were placed, in pixels of the picture."""
    boxes = []
    for text in filter(None, texts):
        extent = text.get_window_extent()
        boxes.append([extent.x0 / 2, HEIGHT - extent.y1 / 2, extent.x1 / 2, HEIGHT - extent.y0 / 2])
    return np.array(boxes).reshape(-1, 4)


def overlapping(boxes):
    first, second = boxes[:, None], boxes[None]
    size = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    return [(i, j) for i, j in np.argwhere((size > 0).all(-1)) if i < j]


@settings(max_examples=15)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.booleans())
def test_labels_are_apart_and_inside_and_the_first_one_is_there(seed, count, centred):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-10, (WIDTH, HEIGHT), (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(15, 80, (count, 2))], 1)
    boxes[0] = 60, 40, 140, 80
    texts = place_labels(
        make_axis(),
        [BoxLabel(b, f"cell {i}") for i, b in enumerate(boxes)],
        size=6,
        centred=centred,
    )
    assert len(texts) == count and texts[0] is not None
    placed = areas(texts)
    assert not overlapping(placed)
    assert (placed[:, :2] >= -0.5).all() and (placed[:, 2:] <= (WIDTH + 0.5, HEIGHT + 0.5)).all()


def test_a_label_is_at_its_box():
    (text,) = place_labels(make_axis(), [BoxLabel((50, 30, 120, 60), "cat")], size=6)
    (x0, y0, _, y1) = areas([text])[0]
    assert 50 <= x0 < 54 and 60 <= y0 < y1 < 75
    (text,) = place_labels(make_axis(), [BoxLabel((50, 30, 120, 119), "cat")], size=6)
    assert areas([text])[0][3] <= 30  # there is no room below
    (text,) = place_labels(make_axis(), [BoxLabel((0, 0, 200, 120), "cat")], size=6)
    assert areas([text])[0][1] < 10  # nor above: within
    (text,) = place_labels(make_axis(), [BoxLabel((0, 0, 200, 120), "cat")], size=6, centred=True)
    x0, y0, x1, y1 = areas([text])[0]
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((100, 60), abs=2)


def test_a_box_outside_of_the_picture_has_no_label():
    outside = BoxLabel((300, 10, 340, 40), "cat")
    assert place_labels(make_axis(), [outside], size=6) == [None]


def test_what_is_taken_stays_free():
    axis = make_axis()
    box = BoxLabel((50, 30, 120, 60), "cat")
    (first,) = place_labels(axis, [box], size=6)
    (second,) = place_labels(axis, [box], size=6, taken=[first.get_window_extent()])
    assert not overlapping(areas([first, second]))


def test_the_best_detections_are_labelled_where_not_all_can_be(monkeypatch):
    seen = {}

    def keep(axis, given, **options):
        texts = labels.place_labels(axis, given, **options)
        seen.update({label.text: text is not None for label, text in zip(given, texts)})
        return texts

    monkeypatch.setattr("detection_toolkit.visualization.pictures.place_labels", keep)
    scores = torch.linspace(0.1, 0.9, 33)
    instances = Instances(
        (60, 80),
        pred_boxes=Boxes(torch.tensor([[20.0, 20.0, 50.0, 40.0]] * 33)),
        scores=scores,
        pred_classes=torch.zeros(33, dtype=torch.long),
    )
    draw_detections(np.zeros((60, 80, 3), np.uint8), instances)
    assert len(seen) == 33 and list(seen)[0] == "0 90%" and seen["0 90%"]
    assert not all(seen.values()) and not seen["0 10%"]


@pytest.mark.parametrize("x", [10, 150])
def test_a_label_wider_than_the_picture_shows_its_beginning(x):
    axis = make_axis()
    texts = place_labels(axis, [BoxLabel([x, 40, x + 30, 70], "class " * 40)], size=6)
    ((left, _, right, _),) = areas(texts)
    assert right > WIDTH
    assert 0 <= left < 5
