"""The code of the query boxes."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import ops

from stageinteractor.boxes import box_to_xyzr, intersection_over_foreground, xyzr_to_box

coordinate = st.floats(0, 2000, width=32)
extent = st.floats(1, 2000, width=32)


@given(coordinate, coordinate, extent, extent)
def test_xyzr_is_inverted_by_its_decoder(x, y, w, h):
    box = torch.tensor([x, y, x + w, y + h], dtype=torch.float64)
    torch.testing.assert_close(xyzr_to_box(box_to_xyzr(box)), box, rtol=1e-9, atol=1e-9)


def test_xyzr_of_a_known_box():
    # 8 wide, 32 high: the scale is sqrt(8 * 32) = 16 = 2^4, the ratio 32 / 8 = 4 = 2^2.
    xyzr = box_to_xyzr(torch.tensor([0.0, 0.0, 8.0, 32.0], dtype=torch.float64))
    expected = torch.tensor([4.0, 16.0, 4.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(xyzr, expected)


def test_iof_is_the_share_of_the_row_box():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 20.0, 10.0]])
    expected = torch.tensor([[1.0, 1.0], [0.5, 1.0]])
    torch.testing.assert_close(intersection_over_foreground(boxes), expected)


def test_log2_area_is_twice_z():
    low = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)).double() * 100
    boxes = torch.cat([low, low + 1 + low.flip(0)], -1)
    z = box_to_xyzr(boxes)[:, 2]
    areas = ops.box_area(boxes)
    torch.testing.assert_close(z, torch.log2(areas) / 2)
    assert math.isclose(float(z[0]), math.log2(float(areas[0])) / 2, rel_tol=1e-12)
