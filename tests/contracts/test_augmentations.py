"""Detectron2's augmentations keep boxes inside and on their objects; orientation is OpenCV's."""

import random

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from detection_toolkit.data import DetectionMapper
from detection_toolkit.data.images import read_image
from detection_toolkit.data.transforms import OpenCVResizeShortestEdge

HEIGHT, WIDTH = 120, 160
BOX = (50, 40, 110, 80)  # xyxy, white on black
LSJ = [
    T.ResizeScale(min_scale=0.5, max_scale=2.0, target_height=140, target_width=140),
    T.FixedSizeCrop(crop_size=(140, 140), pad_value=0.0),
]
AUGMENTATIONS = {
    "large scale jitter": LSJ,
    "rotation": [T.RandomRotation([-40, 40])],
    "rotation without expansion": [T.RandomRotation([-40, 40], expand=False)],
    "extent": [T.RandomExtent(scale_range=(0.6, 1.4), shift_range=(0.2, 0.2))],
    "crop": [T.RandomCrop("relative_range", (0.5, 0.5))],
    "crop by overlap": [T.MinIoURandomCrop()],
    "colour": [
        T.RandomBrightness(0.8, 1.2),
        T.RandomContrast(0.8, 1.2),
        T.RandomSaturation(0.8, 1.2),
        T.RandomLighting(0.5),
    ],
    "nested": [
        T.RandomFlip(prob=0.5, horizontal=False, vertical=True),
        T.RandomApply(
            T.AugmentationList([T.ResizeShortestEdge(150), T.RandomCrop("absolute", (110, 130))]),
            prob=0.7,
        ),
        T.AugmentationList([T.AugmentationList([T.RandomFlip(prob=0.5)]), T.Resize((90, 140))]),
    ],
}


@pytest.fixture
def record(tmp_path):
    """An image with one white object, a crowd and no other."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    path = tmp_path / "white.png"
    Image.fromarray(picture).save(path)
    annotation = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return {
        "file_name": str(path),
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {**annotation, "bbox": list(map(float, BOX)), "iscrowd": 0},
            {**annotation, "bbox": [0.0, 0.0, 5.0, 5.0], "iscrowd": 1},
        ],
    }


@pytest.fixture
def seeded():
    def seed(number):
        np.random.seed(number)
        random.seed(number)

    state = np.random.get_state(), random.getstate()
    yield seed
    np.random.set_state(state[0])
    random.setstate(state[1])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_boxes_stay_inside_and_on_their_objects(record, seeded, name):
    mapper = DetectionMapper(True, augmentations=AUGMENTATIONS[name])
    seen = 0
    for number in range(25):
        seeded(number)
        sample = mapper(record)
        height, width = sample["image"].shape[1:]
        boxes = sample["instances"].gt_boxes.tensor
        assert (boxes >= 0).all()
        assert (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
        white = (sample["image"].float().mean(0) > 100).nonzero()
        if not len(boxes):
            assert len(white) < 4 * max(HEIGHT, WIDTH)  # at most a seam is left
            continue
        top, left = white.min(0).values.tolist()
        bottom, right = (white.max(0).values + 1).tolist()
        found = torch.tensor([left, top, right, bottom], dtype=torch.float32)
        if "rotation" in name:
            # The box of a turned box: where the frame cuts corners off, it may be larger.
            assert (boxes[0, :2] <= found[:2] + 2).all() and (boxes[0, 2:] >= found[2:] - 2).all()
            if name == "rotation":
                torch.testing.assert_close(boxes[0], found, rtol=0, atol=2)
        else:
            # Resizing moves an edge by up to a pixel of the smaller image.
            torch.testing.assert_close(boxes[0], found, rtol=0, atol=2)
        seen += 1
    assert seen >= 15


def test_a_crop_by_overlap_sees_the_boxes_and_crops(record, seeded):
    mapper = DetectionMapper(True, augmentations=[T.MinIoURandomCrop()])
    sizes = set()
    for number in range(20):
        seeded(number)
        sample = mapper(record)
        sizes.add(tuple(sample["image"].shape))
        assert len(sample["instances"]) == 1  # its centre is kept in the crop
    assert len(sizes) > 5


class SeesBoxes(T.Augmentation):
    """Notes what it is given."""

    def get_transform(self, image, boxes):
        self.boxes = boxes
        return T.NoOpTransform()


def test_an_augmentation_sees_the_boxes_as_they_are_by_then(record):
    sees = SeesBoxes()
    mapper = DetectionMapper(True, augmentations=[T.HFlipTransform(WIDTH), sees])
    mapper(record)
    assert sees.boxes.tolist() == [[WIDTH - BOX[2], BOX[1], WIDTH - BOX[0], BOX[3]]]
    mapper({**record, "annotations": []})
    assert sees.boxes.shape == (0, 4)
    DetectionMapper(False, augmentations=[sees])(record)
    assert sees.boxes is None


@pytest.mark.parametrize(
    "augmentation",
    [
        T.RandomFlip(prob=1.0),
        T.RandomFlip(prob=1.0, horizontal=False, vertical=True),
        T.ResizeShortestEdge(90),
        OpenCVResizeShortestEdge(90),
    ],
    ids=["flip", "vertical flip", "resize", "resize with OpenCV"],
)
def test_run_length_masks_stay_on_their_objects(record, augmentation):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    for annotation in record["annotations"]:
        annotation["segmentation"] = mask_util.encode(mask)
    mapper = DetectionMapper(
        True,
        augmentations=[augmentation],
        use_instance_mask=True,
        instance_mask_format="bitmask",
        recompute_boxes=True,
    )
    sample = mapper(record)
    found = sample["instances"].gt_masks.tensor[0]
    white = sample["image"][0] > 127
    # Nearest neighbour against bilinear: they may differ by one line of pixels on each side.
    assert found.shape == white.shape
    assert int((found != white).sum()) <= 2 * sum(found.shape)
    box = sample["instances"].gt_boxes.tensor[0]
    expected = white.nonzero().flip(1)
    expected = torch.cat([expected.min(0).values, expected.max(0).values + 1]).float()
    torch.testing.assert_close(box, expected, rtol=0, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_opencv_turns_it(tmp_path, orientation):
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :16], picture[:16, 16:], picture[16:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(picture).save(path, exif=exif, quality=100, subsampling=0)
    expected = cv2.imread(str(path))
    image = read_image(str(path), "BGR")
    assert image.shape == expected.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    # Two decoders may round differently; the colours are 250 apart.
    assert np.abs(image.astype(int) - expected.astype(int)).max() < 60
