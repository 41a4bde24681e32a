"""Matching, fading, growing, duplicates and label changes on small cases worked out by hand."""

import io
from contextlib import redirect_stdout

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection_toolkit.evaluation import (
    count_label_changes,
    count_score_changes,
    find_duplicates,
    match_detections,
)
from detection_toolkit.evaluation.diagnosis import IGNORED
from detection_toolkit.structures import ClassTargets


def boxes(*left_edges, size=10.0):
    """Squares on a line: two that begin 1 pixel apart have IoU 9 / 11."""
    left = torch.tensor(left_edges, dtype=torch.float32)
    return torch.stack([left, torch.zeros_like(left), left + size, left * 0 + size], 1)


def labels(*classes):
    return torch.tensor(classes, dtype=torch.long)


def test_the_best_detection_takes_the_object_and_a_second_one_is_false():
    found = match_detections(
        boxes(1, 0, 40), labels(0, 0, 0), boxes(0, 41), labels(0, 0), iou_threshold=0.5
    )
    assert found.tolist() == [0, -1, 1]


def test_a_detection_takes_what_it_overlaps_most_among_what_is_left():
    found = match_detections(
        boxes(2, 2), labels(0, 0), boxes(0, 3), labels(0, 0), iou_threshold=0.5
    )
    assert found.tolist() == [1, 0]


def test_another_class_or_too_little_overlap_finds_nothing():
    found = match_detections(boxes(0, 5), labels(1, 0), boxes(0), labels(0), iou_threshold=0.5)
    assert found.tolist() == [-1, -1]


def test_detections_in_a_crowd_of_their_class_are_ignored_and_objects_come_first():
    truth = torch.cat([boxes(0, size=60.0), boxes(0)])
    crowd = torch.tensor([True, False])
    found = match_detections(
        boxes(0, 20, 30, 200),
        labels(0, 0, 1, 0),
        truth,
        labels(0, 0),
        iou_threshold=0.5,
        crowd=crowd,
    )
    assert found.tolist() == [1, IGNORED, -1, -1]


def test_nothing_found_where_there_is_nothing():
    none = torch.zeros(0, 4)
    assert match_detections(boxes(0), labels(0), none, labels(), iou_threshold=0.5).tolist() == [-1]
    assert len(match_detections(none, labels(), boxes(0), labels(0), iou_threshold=0.5)) == 0


@given(st.integers(0, 2**31 - 1), st.sampled_from([0.5, 0.75]))
def test_matches_are_those_of_coco(seed, threshold):
    generator = torch.Generator().manual_seed(seed)

    def draw(count, classes=2):
        corner = torch.randint(0, 12, (count, 2), generator=generator).float()
        size = torch.randint(6, 14, (count, 2), generator=generator).float()
        return torch.cat([corner, corner + size], 1), torch.randint(
            classes, (count,), generator=generator
        )

    truth_boxes, truth_classes = draw(6)
    found_boxes, classes = draw(9)
    crowd = torch.rand(6, generator=generator) < 0.2
    found = match_detections(
        found_boxes, classes, truth_boxes, truth_classes, iou_threshold=threshold, crowd=crowd
    )
    true, false = coco_counts(found_boxes, classes, truth_boxes, truth_classes, crowd, threshold)
    assert (int((found >= 0).sum()), int((found == -1).sum())) == (true, false)


def coco_counts(found_boxes, classes, truth_boxes, truth_classes, crowd, threshold):
    """True and false positives as pycocotools counts them."""

    def xywh(b):
        return [float(v) for v in (*b[:2], *(b[2:] - b[:2]))]

    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": int(c) + 1,
                "bbox": xywh(b),
                "area": float((b[2:] - b[:2]).prod()),
                "iscrowd": int(k),
            }
            for i, (b, c, k) in enumerate(zip(truth_boxes, truth_classes, crowd))
        ],
    }
    results = [
        {"image_id": 1, "category_id": int(c) + 1, "bbox": xywh(b), "score": 1.0 - 0.01 * i}
        for i, (b, c) in enumerate(zip(found_boxes, classes))
    ]
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.iouThrs = [threshold]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    true = false = 0
    for image in filter(None, evaluation.evalImgs):
        for match, ignored in zip(image["dtMatches"][0], image["dtIgnore"][0]):
            if not ignored:
                true, false = true + bool(match), false + (not match)
    return true, false


def test_what_fades_had_a_better_box_and_score_and_what_grows_a_lower_score():
    # Three stages, four queries, one class. The object is at 0.
    scores = torch.tensor(
        [
            [[0.9], [0.3], [0.1], [0.7]],
            [[0.7], [0.9], [0.6], [0.1]],
            [[0.8], [0.8], [0.5], [0.2]],
        ]
    )
    first, second, last = boxes(1, 2, 50, 50), boxes(1, 1, 50, 50), boxes(2, 0, 50, 50)
    changes = count_score_changes(
        scores,
        torch.stack([first, second, last]),
        queries=torch.tensor([0, 1, 2, 3]),
        classes=labels(0, 0, 0, 0),
        found=torch.tensor([0, 0, -1, -1]),
        truth_boxes=boxes(0),
    )
    assert int(changes.true_positives) == 2 and int(changes.false_positives) == 2
    # Query 0 was higher and nearer after stage 0, only nearer after stage 1; query 1 was higher
    # after stage 1 but further away.
    assert changes.faded.tolist() == [1, 0, 1]
    # Query 2 grew from stage 0 and shrank from stage 1; query 3 the other way round.
    assert changes.grown.tolist() == [1, 1, 2]


def test_crowds_are_neither_and_images_without_objects_count():
    changes = count_score_changes(
        torch.tensor([[[0.2]], [[0.4]]]),
        boxes(0, 0).view(2, 1, 4),
        queries=torch.tensor([0]),
        classes=labels(0),
        found=torch.tensor([IGNORED]),
        truth_boxes=torch.zeros(0, 4),
    )
    assert [x.sum().item() for x in changes] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("left", "classes", "expected"),
    [
        ((0, 1, 30), (0, 0, 0), [False, True, False]),
        ((0, 1, 2), (0, 0, 0), [False, True, True]),  # 8 / 12 from the first, 9 / 11 from the 2nd
        ((0, 0), (0, 1), [False, False]),
        ((0, 5), (0, 0), [False, False]),
        ((), (), []),
    ],
)
def test_a_duplicate_overlaps_a_better_one_of_its_class(left, classes, expected):
    found = find_duplicates(boxes(*left), labels(*classes), iou_threshold=0.7)
    assert found.tolist() == expected


def test_label_changes_count_gains_losses_and_exchanges():
    none, a, b, both = [0, 0], [1, 0], [0, 1], [1, 1]
    multi_hot = torch.tensor([[[none, a, a, none]], [[none, b, both, a]], [[none, b, a, none]]])
    changes = count_label_changes(ClassTargets(multi_hot.float()))
    assert changes.changed.tolist() == [3, 2]
    assert changes.labelled.tolist() == [3, 3]
    assert int(changes.queries) == 4
