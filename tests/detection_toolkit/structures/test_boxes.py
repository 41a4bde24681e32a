import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import ops

from detection_toolkit.structures import (
    GroundTruth,
    box_iou,
    box_to_xyzr,
    generalized_box_iou,
    intersection_over_foreground,
    xyzr_to_box,
)

coordinate = st.floats(0, 2000, width=32)
extent = st.floats(1, 2000, width=32)


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    top_left = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 100
    size = 1 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 50
    return torch.cat([top_left, top_left + size], -1)


@given(coordinate, coordinate, extent, extent)
def test_xyzr_is_inverted_by_its_decoder(x, y, w, h):
    box = torch.tensor([x, y, x + w, y + h], dtype=torch.float64)
    torch.testing.assert_close(xyzr_to_box(box_to_xyzr(box)), box, rtol=1e-9, atol=1e-9)


def test_xyzr_of_a_known_box():
    # 8 wide, 32 high: the scale is sqrt(8 * 32) = 16 = 2^4, the ratio 32 / 8 = 4 = 2^2.
    xyzr = box_to_xyzr(torch.tensor([0.0, 0.0, 8.0, 32.0], dtype=torch.float64))
    expected = torch.tensor([4.0, 16.0, 4.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(xyzr, expected)


def test_pairwise_overlaps_agree_with_torchvision():
    a, b = random_boxes(7), random_boxes(5, seed=1)
    pairwise = a[:, None], b[None]
    torch.testing.assert_close(box_iou(*pairwise), ops.box_iou(a, b))
    torch.testing.assert_close(generalized_box_iou(*pairwise), ops.generalized_box_iou(a, b))


def test_overlaps_of_degenerate_boxes_are_finite():
    point = torch.zeros(1, 4, requires_grad=True)
    for overlap in (box_iou, generalized_box_iou):
        value = overlap(point, torch.zeros(1, 4))
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(point.grad).all()


def test_iof_is_the_share_of_the_row_box():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 20.0, 10.0]])
    expected = torch.tensor([[1.0, 1.0], [0.5, 1.0]])
    torch.testing.assert_close(intersection_over_foreground(boxes), expected)


@given(st.integers(0, 50))
def test_iou_is_symmetric_and_bounded(seed):
    a, b = random_boxes(6, seed=seed), random_boxes(6, seed=seed + 100)
    iou = box_iou(a, b)
    torch.testing.assert_close(iou, box_iou(b, a))
    giou = generalized_box_iou(a, b)
    assert ((iou >= 0) & (iou <= 1)).all()
    assert ((giou >= -1) & (giou <= iou + 1e-12)).all()


def test_ground_truth_is_padded_to_the_most_objects():
    truth = GroundTruth.collate(
        [torch.ones(2, 4), torch.ones(0, 4)],
        [torch.tensor([3, 4]), torch.zeros(0, dtype=torch.long)],
        [(10, 20), (30, 40)],
    )
    assert truth.boxes.shape == (2, 2, 4)
    assert truth.num_objects == (2, 0)
    assert truth.labels.tolist() == [[3, 4], [0, 0]]
    assert truth.image_sizes.tolist() == [[20.0, 10.0], [40.0, 30.0]]  # width, height


def test_ground_truth_of_an_all_empty_batch_has_a_row():
    truth = GroundTruth.collate([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.long)], [(8, 8)])
    assert truth.boxes.shape == (1, 1, 4)
    assert truth.num_objects == (0,)


def test_ground_truth_with_more_labels_than_boxes_is_refused():
    with pytest.raises(ValueError, match="image 0 .* 2 boxes but 3 labels"):
        GroundTruth.collate([torch.ones(2, 4)], [torch.tensor([0, 1, 2])], [(8, 8)])


def test_log2_area_is_twice_z():
    boxes = random_boxes(9)
    z = box_to_xyzr(boxes)[:, 2]
    areas = ops.box_area(boxes)
    torch.testing.assert_close(z, torch.log2(areas) / 2)
    assert math.isclose(float(z[0]), math.log2(float(areas[0])) / 2, rel_tol=1e-12)
