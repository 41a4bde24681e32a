"""Masks through augmentations, and objects pasted into other images."""

import dataclasses
from collections import Counter

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.transforms import AugInput, AugmentationList, FixedSizeCrop, RandomFlip
from detectron2.structures import BoxMode

from detection_toolkit.data.copy_paste import (
    AnnotatedImage,
    CopyPaste,
    boxes_of_masks,
    transform_masks,
)
from detection_toolkit.data.transforms import OpenCVResizeScale
from detection_toolkit.errors import UserError


def make_image(*boxes, value=0, size=(100, 120)):
    """An image of one value with rectangles as objects, of classes 0, 1, ..."""
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = True
    return AnnotatedImage(
        np.full((*size, 3), value, np.uint8),
        np.array(boxes, float).reshape(-1, 4),
        np.arange(len(boxes)),
        masks,
    )


@pytest.fixture
def paste_all(monkeypatch):
    """Copy-paste that draws the largest number of objects."""

    def paste(image, other):
        monkeypatch.setattr(np.random, "randint", lambda high: high - 1)
        return CopyPaste()(image, other)

    return paste


def test_pasted_pixels_are_the_other_images(paste_all):
    other = make_image((10, 20, 40, 50), (60, 10, 90, 30), value=200)
    image = make_image((70, 60, 110, 90), value=50)
    result = paste_all(image, other)
    pasted = other.masks.any(0)
    assert (result.image[pasted] == 200).all() and (result.image[~pasted] == 50).all()
    assert sorted(result.classes.tolist()) == [0, 0, 1]
    assert (result.boxes == boxes_of_masks(result.masks)).all()
    assert (image.image == 50).all() and (other.image == 200).all()


@pytest.mark.parametrize(
    ("box", "patch", "left"),
    [
        # Moved by no more than 10 pixels: kept, however little is left.
        ((10, 10, 25, 25), (20, 0, 60, 60), (10, 10, 20, 25)),
        ((10, 10, 21, 21), (11, 0, 60, 60), (10, 10, 11, 21)),
        # Moved by more, with 300 pixels left: dropped; with more than 300: kept.
        ((10, 10, 40, 40), (20, 0, 60, 60), None),
        ((10, 10, 40, 41), (20, 0, 60, 60), (10, 10, 20, 41)),
        # Nothing left, though the box is near the corner.
        ((0, 0, 8, 8), (0, 0, 30, 30), None),
        # Covered in the middle: the box stays.
        ((10, 10, 40, 40), (20, 20, 30, 30), (10, 10, 40, 40)),
        # Not covered at all.
        ((10, 10, 13, 13), (60, 60, 80, 80), (10, 10, 13, 13)),
    ],
)
def test_objects_that_are_covered(paste_all, box, patch, left):
    result = paste_all(make_image(box), make_image(patch, value=255))
    expected = [list(patch)] if left is None else [list(left), list(patch)]
    assert result.boxes.tolist() == expected
    assert [int(m.sum()) for m in result.masks][-1] == (patch[2] - patch[0]) * (patch[3] - patch[1])


def test_what_is_not_covered_is_kept_though_its_box_was_wider_than_its_mask(paste_all):
    """As after a rotation, when the box is that of the turned corners."""
    image = make_image((10, 10, 22, 22))
    image = dataclasses.replace(image, boxes=np.array([[0.0, 0, 40, 40]]))
    result = paste_all(image, make_image((60, 60, 80, 80)))
    assert result.boxes.tolist() == [[10, 10, 22, 22], [60, 60, 80, 80]]


@pytest.mark.parametrize(("objects", "most"), [(4, 100), (4, 3), (0, 100)])
def test_number_of_pasted_objects(objects, most):
    other = make_image(*[(10 * i, 10, 10 * i + 5, 20) for i in range(objects)], value=9)
    image, paste = make_image(), CopyPaste(most)
    np.random.seed(0)
    results = [paste(image, other) for _ in range(3000)]
    counts = Counter(len(result.boxes) for result in results)
    expected = min(objects + 1, most)
    assert set(counts) == set(range(expected))
    assert all(abs(n - 3000 / expected) < 5 * np.sqrt(3000 / expected) for n in counts.values())
    # Every object is as likely as another.
    chosen = Counter(int(c) for result in results for c in result.classes)
    if objects:
        assert max(chosen.values()) < 1.15 * min(chosen.values())


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="max_objects of at least 1.*got 0, 10 and 300"):
        CopyPaste(0)
    with pytest.raises(UserError, match="120x100 and 50x40 pixels: .*FixedSizeCrop"):
        CopyPaste()(make_image(), make_image(size=(40, 50)))


@pytest.mark.parametrize("kind", ["polygon", "rle", "box"])
@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(4))
def test_masks_go_where_the_pixels_go(kind, scale, seed):
    size, side = (80, 110), 100
    boxes = [(12, 9, 47, 51), (60, 30, 108, 78), (0, 0, 10, 12)]
    image = np.zeros((*size, 3), np.uint8)
    annotations = []
    for channel, (x0, y0, x1, y1) in enumerate(boxes):
        image[y0:y1, x0:x1, channel] = 255
        mask = np.asfortranarray(image[..., channel] > 0, dtype=np.uint8)
        segmentation = {
            # Beyond the image, where there are no pixels.
            "polygon": [[x0, y0, x1, y0, x1, y1, x0, y1], [-40, 100, -20, 100, -20, 200, -40, 200]],
            "rle": mask_util.encode(mask),
            "box": None,
        }[kind]
        record = {"bbox": [x0, y0, x1, y1], "bbox_mode": BoxMode.XYXY_ABS}
        annotations.append({**record, **({"segmentation": segmentation} if segmentation else {})})
    augmentations = AugmentationList(
        [
            OpenCVResizeScale(scale, scale, side, side),
            FixedSizeCrop((side, side), pad=False),
            RandomFlip(prob=1.0),
            FixedSizeCrop((side, side), pad=True, pad_value=114),
        ]
    )
    np.random.seed(seed)
    augmented = AugInput(image)
    transforms = augmentations(augmented)
    masks = transform_masks(annotations, transforms, size, (side, side))
    assert augmented.image.shape == (side, side, 3)
    boxes = transforms.apply_box(np.array(boxes, float)).clip(0, side)
    for mask, box, channel in zip(masks, boxes, range(3)):
        pixels = augmented.image[..., channel] > 127
        pixels &= (augmented.image != 114).any(-1)  # of the padding
        assert (mask ^ pixels).sum() <= 0.5 * (box[2:] - box[:2]).sum() + 4
        if mask.any():
            assert np.abs(boxes_of_masks(mask[None])[0] - box).max() <= 1


def test_what_leaves_the_crop_does_not_come_back_with_the_padding():
    record = {"bbox": [10, 10, 90, 20], "bbox_mode": BoxMode.XYXY_ABS}
    augmented = AugInput(np.zeros((40, 100, 3), np.uint8))
    np.random.seed(0)
    transforms = AugmentationList([FixedSizeCrop((40, 50), pad=False), FixedSizeCrop((80, 80))])(
        augmented
    )
    (mask,) = transform_masks([record], transforms, (40, 100), (80, 80))
    assert mask.any() and not mask[:, 50:].any()


def test_boxes_of_masks():
    masks = np.zeros((3, 8, 9), bool)
    masks[0, 2:5, 3:9] = True
    masks[1, 7, 0] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 9, 5], [0, 7, 1, 8], [0, 0, 0, 0]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)
