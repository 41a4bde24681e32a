"""The comparison of detections, and what a file says about itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from detection_toolkit.data.transforms import OpenCVResizeShortestEdge
from detection_toolkit.export import Description, Parity, compare_detections

BOXES = torch.tensor([[0.0, 0, 10, 10], [5, 5, 30, 20], [40, 2, 60, 50], [1, 1, 9, 70]])
SCORES = torch.tensor([0.9, 0.7, 0.5, 0.1])
CLASSES = torch.tensor([0, 1, 0, 2])


def detections(boxes=BOXES, scores=SCORES, classes=CLASSES):
    return Instances((80, 80), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)


def test_equal_detections_agree():
    parity = compare_detections(detections(), detections())
    assert parity == Parity(detections=4) and parity.holds


@pytest.mark.parametrize("shift, holds", [(0.04, True), (0.06, False), (float("nan"), False)])
def test_boxes_agree_within_a_twentieth_of_a_pixel(shift, holds):
    boxes = BOXES.clone()
    boxes[1, 2] += shift
    parity = compare_detections(detections(), detections(boxes=boxes))
    assert parity.holds is holds
    assert parity.unmatched == (0 if holds else 2)


@pytest.mark.parametrize("shift, holds", [(0.9e-4, True), (1.2e-4, False)])
def test_scores_agree_within_a_ten_thousandth(shift, holds):
    scores = SCORES.clone()
    scores[0] += shift
    assert compare_detections(detections(), detections(scores=scores)).holds is holds


def test_another_class_has_no_counterpart():
    classes = CLASSES.clone()
    classes[0] = 1
    assert compare_detections(detections(), detections(classes=classes)).unmatched == 2


def test_a_missing_detection_shows():
    fewer = detections(BOXES[1:], SCORES[1:], CLASSES[1:])
    assert compare_detections(detections(), fewer).unmatched == 1
    none = detections(BOXES[:0], SCORES[:0], CLASSES[:0])
    assert compare_detections(detections(), none).unmatched == 4


def test_order_among_equal_scores_is_free():
    scores = torch.tensor([0.9, 0.7, 0.7, 0.1])
    order = [0, 2, 1, 3]
    swapped = detections(BOXES[order], scores, CLASSES[order])
    assert compare_detections(detections(scores=scores), swapped).holds


def test_which_of_the_last_ties_is_kept_is_free():
    boxes = BOXES.clone()
    boxes[3] = torch.tensor([20.0, 20, 30, 30])
    parity = compare_detections(detections(), detections(boxes=boxes))
    assert parity.holds and parity.detections == 3


def test_sums_keep_the_worst():
    total = Parity(0.01, 1e-5, 3, 0) + Parity(0.02, 1e-6, 4, 1)
    assert total == Parity(0.02, 1e-5, 7, 1) and not total.holds
    assert not Parity().holds  # nothing was compared


@pytest.mark.parametrize("kind", [T.ResizeShortestEdge, OpenCVResizeShortestEdge])
def test_a_description_survives_as_text(kind):
    description = Description.from_test_augmentations(
        [kind(800, 1333)], class_names=["Käse", "b"], image_format="BGR"
    )
    again = Description.from_json(description.to_json())
    assert again == description
    (augmentation,) = again.augmentations().augs
    assert type(augmentation) is kind
    assert (augmentation.short_edge_length, augmentation.max_size) == ((800, 800), 1333)


def test_padding_is_described_too():
    description = Description.from_test_augmentations(
        [OpenCVResizeShortestEdge(64, 64), T.FixedSizeCrop((64, 96), pad_value=114)],
        class_names=None,
        image_format="RGB",
    )
    again = Description.from_json(description.to_json())
    assert again == description
    augmented = T.AugInput(np.zeros((100, 200, 3), dtype=np.uint8))
    again.augmentations()(augmented)
    assert augmented.image.shape == (64, 96, 3)
    assert (augmented.image[32:] == 114).all() and not augmented.image[:32, :64].any()


PADDED = '{"version": 1, "class_names": null, "resizing": "opencv", "short_side": 8, "max_side": 8'


@pytest.mark.parametrize(
    "text, message",
    [
        (PADDED + ', "padded_height": 7, "padded_width": 9}', "padding"),
        (PADDED + ', "padded_height": 0, "padded_width": 9}', "padding"),
        (PADDED + ', "padding_value": 256}', "padding"),
        ('{"version": 1, "class_names": null, "padded_height": 9, "padded_width": 9}', "padding"),
        ("nonsense", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"version": 1, "class_names": null, "surprise": 1}', "cannot be read"),
        ('{"version": 2, "class_names": null}', "version 2"),
        ('{"version": 1, "class_names": null, "resizing": "magic"}', "magic"),
        ('{"version": 1, "class_names": null, "image_format": "HSV"}', "HSV"),
    ],
)
def test_a_foreign_description_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Description.from_json(text)


CUT_OR_PADDED_OTHERWISE = (((7, 8),), ((8, 8), False), ((8, 8), True, 0.5), ((8, 8), True, 256))


@pytest.mark.parametrize(
    "augmentations",
    [[T.RandomFlip()], [T.ResizeShortestEdge(800), T.RandomFlip()], [T.ResizeShortestEdge([1, 2])]]
    + [[T.ResizeShortestEdge(8, 8), T.FixedSizeCrop(*args)] for args in CUT_OR_PADDED_OTHERWISE],
)
def test_treatment_that_no_file_can_describe_is_refused(augmentations):
    with pytest.raises(ValueError, match="resize pictures to one shorter side"):
        Description.from_test_augmentations(augmentations, class_names=None, image_format="RGB")
