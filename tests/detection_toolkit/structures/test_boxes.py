import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import ops

from detection_toolkit.structures import GroundTruth, box_iou, generalized_box_iou
from detection_toolkit.structures.boxes import cxcywh_norm, xyxy_norm


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    top_left = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 100
    size = 1 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 50
    return torch.cat([top_left, top_left + size], -1)


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


def test_normalised_codes_of_a_known_box():
    box, size = torch.tensor([16.0, 32, 48, 128]), torch.tensor([128.0, 256])
    assert xyxy_norm(box, size).tolist() == [0.125, 0.125, 0.375, 0.5]
    assert cxcywh_norm(box, size).tolist() == [0.25, 0.3125, 0.25, 0.375]


@given(st.integers(0, 50))
def test_codes_are_linear_so_that_a_difference_may_be_coded(seed):
    a, b = random_boxes(6, seed=seed), random_boxes(6, seed=seed + 100)
    size = torch.tensor([640.0, 480.0], dtype=torch.float64)
    for code in (xyxy_norm, cxcywh_norm):
        torch.testing.assert_close(code(a - b, size), code(a, size) - code(b, size))
