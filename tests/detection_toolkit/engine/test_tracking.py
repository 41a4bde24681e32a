"""Objects of a video keep their numbers; detections in the form of supervision."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from detection_toolkit.engine import to_supervision
from detection_toolkit.engine.detections import coco_results
from detection_toolkit.engine.tracking import Tracker
from detection_toolkit.errors import MissingPackageError


def make_instances(boxes, scores, classes, size=(200, 300)):
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores, dtype=torch.float32),
        pred_classes=torch.tensor(classes, dtype=torch.long),
    )


def moving(frames, seed=0):
    """Three objects on lines of their own, in an order that changes, with scores that waver.

    Yields:
        instances, and which object each is.
    """
    rng = np.random.default_rng(seed)
    for t in range(frames):
        corners = [(10 + 6 * t, 20), (250 - 6 * t, 90), (40 + 2 * t, 150)]
        boxes = [np.array([x, y, x + 36, y + 30]) + rng.normal(0, 0.7, 4) for x, y in corners]
        scores = rng.uniform(0.55, 0.95, 3)
        if 8 <= t < 11:
            scores[1] = 0.2  # hidden in part: it goes on by its place
        order = rng.permutation(3)
        objects = [i for i in order.tolist() if not (i == 2 and t in (12, 13))]  # not found at all
        yield make_instances([boxes[i] for i in objects], scores[objects], objects), objects


def track(frames=25):
    pytest.importorskip("trackers")
    tracker = Tracker(frame_rate=25, threshold=0.5)
    return [(tracker.update(instances), objects) for instances, objects in moving(frames)]


def test_numbers_stay_with_their_objects():
    numbers = {0: set(), 1: set(), 2: set()}
    for t, (tracked, objects) in enumerate(track()):
        assert tracked.pred_classes.tolist() == objects  # the order given, all kept
        for label, number in zip(objects, tracked.track_ids.tolist()):
            if t == 0:
                assert number == -1  # of one frame alone
            else:
                numbers[label].add(number)
    assert all(len(of_object) == 1 for of_object in numbers.values())
    assert sorted(min(n) for n in numbers.values()) == [0, 1, 2]


def test_the_same_frames_give_the_same_numbers():
    first, second = (torch.cat([f.track_ids for f, _ in track()]) for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_uncertain_continues_a_track_and_begins_none():
    pytest.importorskip("trackers")
    tracker = Tracker(frame_rate=25, threshold=0.5)
    sure = ([10, 10, 50, 50], 0.9, 0)
    doubtful = ([200, 100, 240, 140], 0.3, 1)
    for _ in range(4):
        given = make_instances(*zip(sure, doubtful))
        tracked = tracker.update(given)
        assert tracked.pred_classes.tolist() == [0]
        assert not given.has("track_ids") and len(given) == 2
    tracked = tracker.update(make_instances(*zip(([10, 10, 50, 50], 0.3, 0), doubtful)))
    assert tracked.track_ids.tolist() == [0]
    assert len(tracker.update(make_instances([], [], []))) == 0


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps trackers"):
        Tracker(frame_rate=25, threshold=0.5)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingPackageError, match="pip install supervision"):
        to_supervision(make_instances([], [], []))


@pytest.mark.parametrize("count", [0, 2])
def test_detections_of_supervision(count):
    supervision = pytest.importorskip("supervision")
    boxes = [[1.5, 2, 30, 40], [5, 6, 70, 80]][:count]
    instances = make_instances(boxes, [0.9, 0.4][:count], [1, 2][:count])
    detections = to_supervision(instances, ["cat", "dog"])
    assert isinstance(detections, supervision.Detections) and len(detections) == count
    assert np.array_equal(detections.xyxy, instances.pred_boxes.tensor.numpy())
    assert detections.confidence.tolist() == instances.scores.tolist()
    assert detections.class_id.tolist() == [1, 2][:count]
    assert detections.data["class_name"].tolist() == ["dog", "2"][:count]
    assert detections.tracker_id is None
    assert len(detections[detections.confidence > 0.5]) == min(count, 1)
    instances.track_ids = torch.arange(count) - 1
    assert to_supervision(instances).tracker_id.tolist() == [-1, 0][:count]


def test_results_of_coco():
    instances = make_instances([[1, 2, 30, 40], [5, 6, 70, 80]], [0.9, 0.4], [1, 2])
    first, second = coco_results(instances, "a.png", ["cat", "dog"])
    assert first.pop("score") == pytest.approx(0.9)
    expected = {"image_id": "a.png", "category_id": 1, "category_name": "dog"}
    assert first == {**expected, "bbox": [1, 2, 29, 38]}
    assert second["category_name"] == "2" and "track_id" not in second
    instances.track_ids = torch.tensor([7, -1])
    assert [r["track_id"] for r in coco_results(instances, 3)] == [7, None]
