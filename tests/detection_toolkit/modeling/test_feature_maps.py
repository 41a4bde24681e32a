"""Feature maps: padding, valid ratios, and how long they live."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from detectron2.config import instantiate
from small_runs import SMALL_MODEL, make_batch

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.modeling import FeatureMaps
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
