"""Case files whose configs differ from those of the stored ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from detection_toolkit.parity import Case
from hpr.parity import PlainBaseCase
from hpr.parity_of_bases import AlignDETRBaseCase, DDQBaseCase

CONFIG = dict(
    C=7,
    D=32,
    L=3,
    Q=20,
    dyf=8,
    nms=0.6,
    dense_ratio=1.5,
    merge="learnable_channel_aware",
    use_dn=True,
    aux_weights=[0.5, 0.25],
    repeat=[2, 2, 1, 2],
)


def case_of(folder, kind, arrays=None, **config):
    """A case file with nothing but a config, and sizes of images."""
    contents = {
        "config_json": json.dumps({**CONFIG, "kind": kind, **config}),
        "in/img_shapes": np.array([[123, 140], [77, 155]]),
        "in/batch_shape": np.array([123, 155]),
        "infer/init_reference": np.zeros(0, np.float32),
        **(arrays or {}),
    }
    np.savez(folder / "case.npz", **contents)
    return Case(folder / "case.npz")


@pytest.mark.parametrize("objects", [{}, {"gt/0/labels": np.zeros(0, np.int64)}])
@pytest.mark.parametrize("stages", [1, 2])
def test_the_choice_of_distinct_queries_is_asked_for_where_there_is_one(tmp_path, stages, objects):
    norm = {"train/grad_norm/x": np.float32(1)}
    case = case_of(tmp_path, "ddq", {**norm, **objects}, L=stages, use_dn=False)
    names = {quantity.name for quantity in DDQBaseCase(case).quantities()}
    assert ("infer/distinct_kept" in names) == (stages > 1)
    assert ("train/distinct_mask" in names) == (stages > 1 and bool(objects))


def test_a_padded_batch_need_not_be_a_multiple_of_the_strides(tmp_path):
    case = PlainBaseCase(case_of(tmp_path, "dino"))
    batch = case.batch([torch.zeros(2, 24, 16, 20)])
    assert batch.tensor.shape == (2, 3, 123, 155)
    assert list(batch.image_sizes) == [(123, 140), (77, 155)]


@pytest.mark.parametrize("base", [PlainBaseCase, AlignDETRBaseCase, DDQBaseCase])
@pytest.mark.parametrize("use_dn", [False, True])
def test_any_base_may_be_without_denoising(tmp_path, base, use_dn):
    case = base(case_of(tmp_path, base.kinds[-1], use_dn=use_dn))
    branches = case.criterion().branches
    for branch in ("denoising", "regional_denoising", "dynamic_denoising"):
        assert (branch in branches) == use_dn


@pytest.mark.parametrize("base", [PlainBaseCase, AlignDETRBaseCase, DDQBaseCase])
def test_the_class_cost_of_all_bases_is_mmdetections(tmp_path, base):
    criterion = base(case_of(tmp_path, base.kinds[-1])).criterion()
    certain = torch.tensor([-40.0, 40.0], dtype=torch.float64)
    p = certain.sigmoid()
    expected = (1 - p + 1e-12).log() * -0.75 * p**2 + (p + 1e-12).log() * 0.25 * (1 - p) ** 2
    for own in (criterion.main, *(criterion.branches[x] for x in ("encoder", "regional"))):
        assert torch.allclose(own.matcher.class_cost(certain), -expected, rtol=1e-9, atol=0)
