"""Colour and geometric operations, erasing: by distribution and by examples."""

import itertools
from collections import Counter

import numpy as np
import pytest
from detectron2.data.transforms import AugInput
from hypothesis import given
from hypothesis import strategies as st

from detection_toolkit.data.strong import (
    COLOR_OPERATIONS,
    GEOMETRIC_OPERATIONS,
    ColorOperation,
    ErasingTransform,
    GeometricOperation,
    InRandomOrder,
    RandomColorOperation,
    RandomErasing,
    RandomGeometricOperation,
)
from detection_toolkit.errors import UserError

BLENDS = ("sharpness", "color", "contrast", "brightness")
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def draw(augmentation, count, image=IMAGE):
    np.random.seed(0)
    return [augmentation.get_transform(image) for _ in range(count)]


def assert_shares(counts, expected, total):
    """Within five standard deviations of the share that each should have."""
    assert set(counts) == set(expected)
    share = 1 / len(expected)
    allowed = 5 * np.sqrt(total * share * (1 - share))
    assert max(abs(count - total * share) for count in counts.values()) < allowed


def test_the_nine_colour_operations_are_as_likely():
    drawn = draw(RandomColorOperation(), 9000)
    assert len(COLOR_OPERATIONS) == 9
    assert_shares(Counter(t.name for t in drawn), COLOR_OPERATIONS, 9000)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        *[(name, 0.1, 1.9) for name in BLENDS],
        ("posterize", 0.0, 4.0),
        ("solarize", 0.0, 256.0),
    ],
)
def test_magnitudes_of_colour_operations(name, low, high):
    values = np.array([t.magnitude for t in draw(RandomColorOperation([name]), 20000)])
    assert_magnitudes(values, low, high)


def assert_magnitudes(values, low, high):
    """Uniform in a range, rounded to one decimal."""
    assert np.allclose(values * 10, np.round(values * 10))
    assert low <= values.min() and values.max() <= high
    reach = 0.01 * (high - low)
    assert values.min() <= low + reach and values.max() >= high - reach
    assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * len(values))
    quarters = np.histogram(values, 4, (low, high))[0]
    assert quarters.min() > 0.22 * len(values)


def test_the_five_geometric_operations_are_as_likely():
    drawn = draw(RandomGeometricOperation(), 5000)
    assert len(GEOMETRIC_OPERATIONS) == 5
    assert_shares(Counter(t.name for t in drawn), GEOMETRIC_OPERATIONS, 5000)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y"])
def test_angles_are_up_to_30_degrees_either_way(name):
    values = np.array([t.magnitude for t in draw(RandomGeometricOperation([name]), 20000)])
    assert_magnitudes(np.abs(values), 0.0, 30.0)
    assert abs((values > 0).mean() - (values < 0).mean()) < 5 / np.sqrt(20000)


@pytest.mark.parametrize("name", ["translate_x", "translate_y"])
def test_translations_are_a_tenth_of_the_side_or_none(name):
    drawn = draw(RandomGeometricOperation([name]), 20000)
    counts = Counter(float(t.magnitude) for t in drawn)
    assert set(counts) == {0.0, 0.1, -0.1}  # -0.0 == 0.0
    assert abs(counts[0.0] / 20000 - 0.5) < 5 * 0.5 / np.sqrt(20000)
    side = 60 if name == "translate_x" else 40
    moved = next(t for t in drawn if t.magnitude > 0).apply_coords(np.zeros((1, 2)))
    assert moved.tolist() == [[0.1 * side, 0] if name == "translate_x" else [0, 0.1 * side]]


@pytest.mark.parametrize(
    "name,magnitude,moved",
    [
        ("shear_x", 45.0, (30.5 + 8, 8.5)),  # the centre of row 8 is 8 from that of row 0
        ("shear_y", 45.0, (30.5, 8.5 + 30)),
        ("shear_x", -45.0, (30.5 - 8, 8.5)),
        ("translate_x", 0.1, (30.5 + 6, 8.5)),
        ("translate_y", -0.1, (30.5, 8.5 - 4)),
        ("rotate", 90.0, (30 - 11.5, 20 - 0.5)),  # counter-clockwise: from above to the left
        ("rotate", -90.0, (30 + 11.5, 20 + 0.5)),
    ],
)
def test_where_a_pixel_goes(name, magnitude, moved):
    transform = GeometricOperation(name, magnitude, 40, 60)
    assert transform.apply_coords(np.array([[30.5, 8.5]]))[0] == pytest.approx(moved)
    image = np.zeros((40, 60, 3), np.uint8)
    image[8, 30] = 200
    row, column = int(moved[1]), int(moved[0])
    assert transform.apply_image(image)[row, column].min() > 190
    assert transform.apply_segmentation(image[..., 0])[row, column] == 200


def apply(name, magnitude, image, image_format="RGB"):
    return ColorOperation(name, magnitude, image_format).apply_image(image)


def test_colour_operations_on_values():
    assert (apply("none", None, IMAGE) == IMAGE).all()
    assert (apply("posterize", 2.1, IMAGE) == (IMAGE & 0b11100000)).all()
    assert (apply("posterize", 4.0, IMAGE) == (IMAGE & 0b11110000)).all()
    assert (apply("posterize", 0.0, IMAGE) == 0).all()
    assert (apply("solarize", 99.5, IMAGE) == np.where(IMAGE < 99.5, IMAGE, 255 - IMAGE)).all()
    assert (apply("solarize", 256.0, IMAGE) == IMAGE).all()
    dim = apply("brightness", 0.5, IMAGE).astype(float)
    assert np.abs(dim - IMAGE / 2).max() <= 1
    grey = IMAGE @ (0.299, 0.587, 0.114)
    for factor in (0.1, 1.9):
        color = (grey + factor * (IMAGE.astype(float).transpose(2, 0, 1) - grey)).transpose(1, 2, 0)
        assert np.abs(apply("color", factor, IMAGE) - color.clip(0, 255)).max() <= 2
        contrast = grey.mean() + factor * (IMAGE - grey.mean())
        assert np.abs(apply("contrast", factor, IMAGE) - contrast.clip(0, 255)).max() <= 2
    for name in BLENDS:
        assert (apply(name, 1.0, IMAGE) == IMAGE).all()


def test_sharpness_blends_with_a_smoothed_image():
    image = np.full((5, 5, 3), 100, np.uint8)
    image[2, 2] = 126
    smooth = apply("sharpness", 0.0, image).astype(int)
    # The middle weighs 5 of 13.
    assert smooth[2, 2].tolist() == [110] * 3 and smooth[1, 1].tolist() == [102] * 3
    assert (smooth[0] == 100).all()
    assert apply("sharpness", 1.5, image)[2, 2].tolist() == [134] * 3


def test_autocontrast_and_equalize_use_the_whole_range_in_every_channel():
    ramp = np.stack([np.tile(np.arange(60, 160), (4, 1)), np.tile(np.arange(100), (4, 1))] * 2, 2)
    ramp = ramp[..., :3].astype(np.uint8)
    for name in ("autocontrast", "equalize"):
        result = apply(name, None, ramp)
        assert (result.min((0, 1)) == 0).all() and (result.max((0, 1)) == 255).all()
        assert (np.diff(result[0].astype(int), axis=0) >= 0).all()
    # Already flat values stay where they are, more or less.
    flat = np.tile(np.arange(256, dtype=np.uint8)[:, None], (256, 1, 3)).reshape(256, 256, 3)
    assert np.abs(apply("equalize", None, flat).astype(int) - flat).max() <= 1


@pytest.mark.parametrize("name", COLOR_OPERATIONS)
def test_bgr_images_come_out_as_rgb_images_do(name):
    transform = draw(RandomColorOperation([name]), 1)[0]
    rgb = transform.apply_image(IMAGE)
    bgr = apply(name, transform.magnitude, IMAGE[..., ::-1], "BGR")
    assert (bgr[..., ::-1] == rgb).all()
    assert rgb.dtype == np.uint8 and rgb.shape == IMAGE.shape


@pytest.mark.parametrize("name", COLOR_OPERATIONS)
def test_colour_operations_leave_boxes_and_masks(name):
    transform = draw(RandomColorOperation([name]), 1)[0]
    boxes = np.array([[3.0, 4, 10, 12]])
    assert (transform.apply_box(boxes) == boxes).all()
    mask = IMAGE[..., 0] > 100
    assert (transform.apply_segmentation(mask) == mask).all()


def pixel_box(values):
    """``xyxy`` around what is above zero."""
    ys, xs = np.nonzero(values)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@given(
    name=st.sampled_from(GEOMETRIC_OPERATIONS),
    share=st.floats(-1, 1),
    corner=st.tuples(st.integers(0, 150), st.integers(0, 90)),
    sides=st.tuples(st.integers(8, 90), st.integers(8, 60)),
)
def test_a_drawn_rectangle_stays_in_its_box(name, share, corner, sides):
    magnitude = share * (0.1 if name.startswith("translate") else 30)
    height, width = 120, 180
    box = np.array([*corner, *np.minimum(np.add(corner, sides), (width, height))], float)
    image = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box.astype(int)
    image[y0:y1, x0:x1] = 255
    transform = GeometricOperation(name, magnitude, height, width, fill=0)
    moved = transform.apply_box(box[None])[0]
    expected = moved.clip(0, (width, height, width, height))
    if (expected[2:] - expected[:2] < 6).any():
        return  # a corner of it is left, which may be less than a pixel wide
    drawn = transform.apply_image(image)[..., 0]
    mask = transform.apply_segmentation(image[..., 0] > 0)
    assert mask.dtype == bool
    if (moved == expected).all():
        assert np.abs(pixel_box(drawn > 40) - expected).max() <= 1
        assert np.abs(pixel_box(mask) - expected).max() <= 1.5  # a sharp corner has no centre
    # What is cut off may have had the corner, but never is anything outside.
    inside = np.zeros((height, width), bool)
    a, b = np.floor(expected[:2]).astype(int), np.ceil(expected[2:]).astype(int)
    inside[a[1] : b[1], a[0] : b[0]] = True
    assert not (mask & ~inside).any()
    assert not ((drawn > 127) & ~inside).any()


@pytest.mark.parametrize("name", GEOMETRIC_OPERATIONS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_centre_of_a_rectangle_moves_as_its_coordinates(name, sign):
    """To a fraction of a pixel: half a pixel of drift would show."""
    magnitude = sign * (0.1 if name.startswith("translate") else 27.3)
    image = np.zeros((121, 180, 3), np.uint8)
    image[50:71, 60:81] = 255
    transform = GeometricOperation(name, magnitude, 121, 180, fill=0)
    weights = transform.apply_image(image)[..., 0].astype(float)
    ys, xs = np.mgrid[:121, :180] + 0.5
    center = np.array([(weights * xs).sum(), (weights * ys).sum()]) / weights.sum()
    assert np.abs(center - transform.apply_coords(np.array([[70.5, 60.5]]))[0]).max() < 0.05


def test_the_rotation_turns_counter_clockwise_around_the_middle():
    turn = GeometricOperation("rotate", 90.0, 100, 100)
    assert np.allclose(turn.apply_coords(np.array([[50.0, 50], [100, 50]])), [[50, 50], [50, 0]])


def test_what_comes_from_outside_is_grey():
    image = np.zeros((40, 60, 3), np.uint8)
    moved = GeometricOperation("translate_x", 0.1, 40, 60).apply_image(image)
    assert (moved[:, :6] == 128).all() and (moved[:, 6:] == 0).all()
    mask = GeometricOperation("translate_x", 0.1, 40, 60).apply_segmentation(np.ones((40, 60)) > 0)
    assert not mask[:, :6].any() and mask[:, 6:].all()


def test_erased_patches_by_distribution():
    image = np.zeros((200, 300, 3), np.uint8)
    drawn = draw(RandomErasing(), 5000, image)
    assert_shares(Counter(len(t.patches) for t in drawn), {1, 2, 3, 4, 5}, 5000)
    patches = np.concatenate([t.patches for t in drawn])
    assert patches.min() >= 0 and (patches[:, 2:] <= (300, 200)).all()
    sides = patches[:, 2:] - patches[:, :2]
    assert sides.max(0).tolist() == [59, 39] and sides.min(0).tolist() == [0, 0]
    # One share for height and width; each side is rounded down.
    assert (np.abs(sides[:, 0] / 300 - sides[:, 1] / 200) < 1 / 200).all()
    assert abs((sides[:, 1] + 0.5).mean() / 200 - 0.1) < 0.002
    free = (300, 200) - sides
    places = patches[:, :2] / np.maximum(free, 1)
    assert np.abs(places.mean(0) - 0.5).max() < 0.02 and places.max() == 1 and places.min() == 0


def test_erasing_fills_patches_and_keeps_what_it_is_given():
    transform = ErasingTransform(np.array([[5, 10, 20, 30], [40, 0, 60, 8]]))
    before = IMAGE.copy()
    erased = transform.apply_image(IMAGE)
    where = np.zeros((40, 60), bool)
    where[10:30, 5:20] = where[:8, 40:] = True
    assert (erased[where] == 128).all() and (erased[~where] == IMAGE[~where]).all()
    assert (IMAGE == before).all()
    assert (transform.apply_segmentation(np.ones((40, 60), bool)) == ~where).all()
    corners = np.array([[5.0, 10], [20, 30]])
    assert (transform.apply_coords(corners) == corners).all()


@pytest.mark.parametrize(
    ("patches", "box", "share"),
    [
        ([[0, 0, 10, 10]], [0, 0, 10, 10], 1.0),
        ([[0, 0, 10, 9]], [0, 0, 10, 10], 0.9),
        ([[2, 2, 4, 4]], [0, 0, 10, 10], 0.04),
        ([[0, 0, 5, 10], [5, 0, 10, 10]], [0, 0, 10, 10], 1.0),
        # What two patches have in common counts once.
        ([[0, 0, 6, 10], [2, 0, 6, 10]], [0, 0, 10, 10], 0.6),
        ([[0, 0, 6, 10], [0, 0, 6, 10]], [0, 0, 10, 10], 0.6),
        ([[3, 0, 9, 10], [0, 4, 10, 6]], [0, 0, 10, 10], 0.68),
        ([[0, 0, 10, 10]], [0.5, 0.25, 20.5, 10.25], 9.5 * 9.75 / 200),
        ([[20, 20, 30, 30]], [0, 0, 10, 10], 0.0),
        ([[0, 0, 10, 10]], [4, 4, 4, 9], 0.0),
        ([], [0, 0, 10, 10], 0.0),
    ],
)
def test_share_of_a_box_that_is_erased(patches, box, share):
    transform = ErasingTransform(np.array(patches))
    assert transform.covered_share(np.array([box], float)) == pytest.approx([share])
    assert transform.covered_share(np.zeros((0, 4))).shape == (0,)


@given(
    patches=st.lists(st.tuples(*[st.integers(0, 12)] * 4), max_size=5),
    box=st.tuples(*[st.integers(0, 12)] * 4),
)
def test_the_erased_share_counts_pixels(patches, box):
    patches = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in patches]
    x0, y0, x1, y1 = sorted(box[::2])[0], sorted(box[1::2])[0], max(box[::2]), max(box[1::2])
    transform = ErasingTransform(np.array(patches))
    erased = ~transform.apply_segmentation(np.ones((12, 12), bool))
    inside = erased[y0:y1, x0:x1]
    expected = inside.mean() if inside.size else 0.0
    assert transform.covered_share(np.array([[x0, y0, x1, y1]], float))[0] == pytest.approx(
        expected
    )


def test_a_random_order_has_all_orders_as_often():
    class Note:
        def __init__(self, name):
            self.name = name

        def __call__(self, aug_input):
            order.append(self.name)
            return GeometricOperation("translate_x", 0.0, 40, 60)

    steps = InRandomOrder([])
    steps.augs = [Note("a"), Note("b"), Note("c")]
    np.random.seed(0)
    counts = Counter()
    for _ in range(3000):
        order = []
        steps(AugInput(IMAGE))
        counts["".join(order)] += 1
    assert_shares(counts, {"".join(p) for p in itertools.permutations("abc")}, 3000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomColorOperation(["blur"]), r"some of none, autocontrast.*got \['blur'\]"),
        (lambda: RandomColorOperation([]), r"operations must be some of"),
        (lambda: RandomColorOperation(image_format="L"), "image_format must be RGB or BGR"),
        (lambda: RandomGeometricOperation(["flip"]), r"rotate, shear_x.*got \['flip'\]"),
        (lambda: RandomErasing(patches=(3, 1)), r"patches must be .*got \[3, 1\]"),
        (lambda: RandomErasing(side=(0.0, 1.5)), r"side must be .*got \[0.0, 1.5\]"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
