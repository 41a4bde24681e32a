"""Feature maps: padding, valid ratios, and how long they live."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from small_runs import SMALL_MODEL, make_batch
from tolerances import tolerance

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.modeling import Execution, FeatureMaps, gathering
from maps import make_maps

CONFIGS = (
    "stageinteractor/shapes_tiny.py",
    "adamixer/adamixer_shapes_tiny.py",
    "sqr/stageinteractor_sqr_shapes_tiny.py",
    "sqr/adamixer_sqr_shapes_tiny.py",
)


def test_padding_is_that_of_the_nearest_pixel():
    # Maps that do not divide the padded batch: 5 x 7 cells of 17 x 26 pixels.
    level = torch.zeros(2, 1, 5, 7)
    maps = FeatureMaps((level,), (4,), torch.tensor([[17, 26], [9, 12]]), (17, 26))
    (mask,) = maps.padding_masks
    pixels = torch.ones(2, 17, 26, dtype=torch.bool)
    for image, (height, width) in zip(pixels, ((17, 26), (9, 12))):
        image[:height, :width] = False
    for row in range(5):
        for column in range(7):
            nearest = pixels[:, row * 17 // 5, column * 26 // 7]
            assert torch.equal(mask[:, row, column], nearest)


def test_valid_ratios_are_the_shares_of_the_first_row_and_column():
    levels = [torch.zeros(2, 1, 8, 12), torch.zeros(2, 1, 4, 6)]
    maps = make_maps(levels, (4, 8), [(32, 48), (16, 12)])
    expected = torch.tensor([[[1, 1], [1, 1]], [[3 / 12, 4 / 8], [2 / 6, 2 / 4]]])
    torch.testing.assert_close(maps.valid_ratios, expected)


@pytest.mark.parametrize("sampling", ["gather", "grid"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_maps_of_a_step_do_not_outlive_it(config, training, sampling):
    """What autograd keeps must not refer to itself: Python's cyclic collector runs seldom."""
    methods_own = ("base_points", "sub_points") if "adamixer" in config else ()
    small = [x for x in SMALL_MODEL if not any(key in x for key in methods_own)]
    cfg = apply_overrides(get_config(config), [*small, f"model.execution.sampling={sampling}"])
    torch.manual_seed(0)
    detector = instantiate(cfg.model).train(training)
    alive = []
    detector.backbone.register_forward_hook(
        lambda _, __, levels: alive.extend(map(weakref.ref, levels.values()))
    )
    tables = []
    laid_out = FeatureMaps.laid_out

    def note(maps, *arguments):
        result = laid_out(maps, *arguments)
        if result.sampler is not None:
            tables.extend(weakref.ref(table) for table in result.sampler.tables)
        return result

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureMaps, "laid_out", note)
            result = detector(make_batch([2, 0]))
            if training:
                sum(result.values()).backward()
        del result
        assert len(alive) == 4 and (sampling == "grid" or len(tables) == 4)
        assert not any(reference() is not None for reference in [*alive, *tables])
    finally:
        gc.enable()


def random_points(sets: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Places in cells, some of them outside, and weights (L, sets B, N, G, P)."""
    shape = (2, sets * 2, 5, 3, 4)
    return (
        6 * torch.rand(shape, dtype=dtype) - 1,
        6 * torch.rand(shape, dtype=dtype) - 1,
        torch.randn(shape, dtype=dtype),
    )


@pytest.mark.parametrize("sampling", ["gather", "gather in pieces", "grid"])
@pytest.mark.parametrize("sets", [1, 2])
def test_the_sum_over_points_is_that_of_grid_sample(sampling, sets, monkeypatch):
    """Values, and gradients of maps, places and weights, written out level by level."""
    if sampling == "gather in pieces":  # of two queries, and one
        monkeypatch.setattr("detection_toolkit.modeling.gathering._POINTS", 2 * sets * 2 * 3 * 4)
        sampling = "gather"
    torch.manual_seed(0)
    dtype = torch.float64
    levels = [torch.randn(2, 6, *size, dtype=dtype) for size in ((5, 4), (3, 2))]
    inputs = [x.requires_grad_() for x in (*levels, *random_points(sets, dtype))]
    x, y, weights = inputs[2:]
    maps = make_maps(levels, (8, 16)).laid_out(Execution(sampling=sampling), dtype)
    ours = maps.sample_sum(x, y, weights)

    expected = torch.zeros(2 * sets, 5, 3, 2, dtype=dtype)
    for level, x_l, y_l, weights_l in zip(levels, x, y, weights):
        height, width = level.shape[-2:]
        grid = torch.stack([2 * x_l / width - 1, 2 * y_l / height - 1], dim=-1)
        for row in range(2 * sets):
            for group in range(3):
                values = F.grid_sample(
                    level[row // sets, 2 * group : 2 * group + 2][None],
                    grid[row, :, group][None],
                    align_corners=False,
                )[0]  # (e, N, P)
                summed = (values * weights_l[row, :, group]).sum(-1).T
                expected = expected.index_put(
                    (torch.tensor(row), torch.arange(5), torch.tensor(group)), summed, True
                )
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction, retain_graph=True),
        torch.autograd.grad(expected, inputs, direction),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_points", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_of_a_query_are_exchanged_with_those_of_a_corner(dtype, num_points):
    """Whatever a point's size, and by as many points at once as a wide number holds."""
    torch.manual_seed(0)
    factors = torch.randn(2, 4, 5 * num_points, dtype=dtype, requires_grad=True)
    expected = factors.unflatten(-1, (5, num_points)).transpose(1, 2).flatten(2)
    exchanged = gathering._Exchange.apply(factors, num_points)
    assert torch.equal(exchanged, expected)
    direction = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(x, factors, direction)[0] for x in (exchanged, expected))
    assert torch.equal(ours, theirs)
    rows = torch.arange(8 * 5 * num_points, dtype=torch.int).view(2, 4, -1)
    expected = rows.unflatten(-1, (5, num_points)).transpose(1, 2).flatten(2)
    assert torch.equal(gathering._exchange(rows, num_points), expected)


@pytest.mark.parametrize("sampling", ["gather", "grid"])
def test_the_sum_over_points_is_that_of_the_samples(sampling):
    torch.manual_seed(0)
    levels = [torch.randn(2, 6, *size) for size in ((5, 4), (3, 2))]
    maps = make_maps(levels, (8, 16)).laid_out(Execution(sampling=sampling), torch.float32)
    points = random_points(1, torch.float32)
    limits = tolerance(torch.float32, scale=100.0, operations=32)
    torch.testing.assert_close(maps.sample_sum(*points), maps.sample(*points).sum(dim=-2), **limits)


def test_points_that_fit_no_image_are_refused():
    maps = make_maps([torch.zeros(2, 6, 5, 4), torch.zeros(2, 6, 3, 2)], (8, 16))
    points = [x[:, :3] for x in random_points(2, torch.float32)]
    with pytest.raises(ValueError, match="3 sets"):
        maps.sample_sum(*points)
