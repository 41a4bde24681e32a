"""OpenCV's resizing beside Detectron2's, and the augmentation of the 300-query models."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from detectron2.config import instantiate
from detectron2.data import transforms as T

from detection_toolkit.config import get_config
from detection_toolkit.data.transforms import OpenCVResizeShortestEdge, OpenCVResizeTransform


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)


def test_pixels_are_those_of_opencv(picture):
    transform = OpenCVResizeShortestEdge(40).get_transform(picture)
    expected = cv2.resize(picture, (transform.new_w, 40), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(transform.apply_image(picture), expected)


def test_pixels_are_those_of_pillow_where_an_image_keeps_its_size(picture):
    for resize in (OpenCVResizeShortestEdge(61), T.ResizeShortestEdge(61)):
        np.testing.assert_array_equal(resize.get_transform(picture).apply_image(picture), picture)


def test_pixels_differ_from_pillow_when_an_image_shrinks(picture):
    pillow = T.ResizeShortestEdge(30).get_transform(picture).apply_image(picture)
    opencv = OpenCVResizeShortestEdge(30).get_transform(picture).apply_image(picture)
    assert pillow.shape == opencv.shape
    # Noise keeps its contrast where four pixels are read, and loses it where all are averaged.
    assert opencv.std() > 1.2 * pillow.std()


@pytest.mark.parametrize("size", [(480, 640), (333, 1000), (1000, 333), (800, 1333), (37, 37)])
@pytest.mark.parametrize("short_edge", [400, 800])
def test_sizes_and_boxes_are_those_of_detectron2(size, short_edge):
    picture = np.zeros((*size, 3), np.uint8)
    boxes = np.array([[3.0, 5.0, 30.5, 36.0]])
    ours = OpenCVResizeShortestEdge(short_edge, 1333).get_transform(picture)
    theirs = T.ResizeShortestEdge(short_edge, 1333).get_transform(picture)
    assert ours.apply_image(picture).shape == theirs.apply_image(picture).shape
    np.testing.assert_array_equal(ours.apply_box(boxes.copy()), theirs.apply_box(boxes.copy()))


def test_inverse_leads_back(picture):
    transform = OpenCVResizeShortestEdge(50).get_transform(picture)
    points = np.array([[10.0, 20.0], [96.0, 60.0]])
    back = transform.inverse().apply_coords(transform.apply_coords(points.copy()))
    np.testing.assert_allclose(back, points)
    assert transform.inverse().apply_image(transform.apply_image(picture)).shape == picture.shape


def test_masks_keep_their_values_and_grey_images_their_dimensions(picture):
    transform = OpenCVResizeTransform(61, 97, 30, 45)
    mask = (picture[..., 0] > 127).astype(np.uint8) * 7
    assert set(np.unique(transform.apply_segmentation(mask))) <= {0, 7}
    assert transform.apply_image(picture[..., :1]).shape == (30, 45, 1)
    assert transform.apply_image(picture[..., 0]).shape == (30, 45)


def test_an_image_of_another_size_is_refused(picture):
    with pytest.raises(ValueError, match="10x20 pixels.*got 61x97"):
        OpenCVResizeTransform(10, 20, 5, 10).apply_image(picture)


def augmentations(name: str) -> T.AugmentationList:
    config = get_config(f"stageinteractor/{name}.py")
    mapper = config.dataloader.train.mapper
    return T.AugmentationList([instantiate(a) for a in mapper.augmentations])


def resulting_transforms(name: str, size: tuple[int, int], count: int) -> list[list[T.Transform]]:
    np.random.seed(0)
    image = np.zeros((*size, 3), np.uint8)
    pipeline = augmentations(name)
    return [_flat(pipeline(T.AugInput(image.copy()))) for _ in range(count)]


def _flat(transforms: T.TransformList) -> list[T.Transform]:
    flat = []
    for t in transforms.transforms:
        flat.extend(_flat(t) if isinstance(t, T.TransformList) else [t])
    return flat


def test_crop_augmentation():
    runs = resulting_transforms("stageinteractor_r50_300q_crop_3x", (480, 640), 400)
    cropped, scales, heights, widths = 0, set(), [], []
    for transforms in runs:
        resizes = [t for t in transforms if isinstance(t, OpenCVResizeTransform)]
        crops = [t for t in transforms if isinstance(t, T.CropTransform)]
        assert len(resizes) == 1 + len(crops)
        final = resizes[-1]
        assert max(final.new_h, final.new_w) <= 1333
        scales.add(min(final.new_h, final.new_w))
        if crops:
            cropped += 1
            assert resizes[0].new_h in (400, 500, 600)
            assert (final.h, final.w) == (crops[0].h, crops[0].w)
            assert 384 <= crops[0].w <= 600
            assert 384 <= crops[0].h <= min(600, resizes[0].new_h)
            if resizes[0].new_h == 600:
                heights.append(crops[0].h)
            widths.append(crops[0].w)
    assert 160 < cropped < 240  # half of 400, within four standard deviations
    assert scales == set(range(480, 801, 32))
    assert np.mean(widths) == pytest.approx((384 + 600) / 2, abs=20)
    assert np.mean(heights) == pytest.approx((384 + 600) / 2, abs=30)
    assert len({round(h / w, 2) for h, w in zip(heights, widths)}) > 20


def test_crop_takes_what_a_narrow_image_has():
    for transforms in resulting_transforms("stageinteractor_r50_300q_crop_3x", (200, 1400), 30):
        for crop in (t for t in transforms if isinstance(t, T.CropTransform)):
            assert crop.h == 190  # the whole height: 200 scaled until 1400 fits into 1333
            assert 384 <= crop.w <= 600


def test_multi_scale_augmentation():
    runs = resulting_transforms("stageinteractor_r50_100q_ms_3x", (480, 640), 200)
    finals = [t for transforms in runs for t in transforms if isinstance(t, OpenCVResizeTransform)]
    assert {t.new_h for t in finals} == set(range(480, 801, 32))
    flips = sum(isinstance(t, T.HFlipTransform) for transforms in runs for t in transforms)
    assert 70 < flips < 130
