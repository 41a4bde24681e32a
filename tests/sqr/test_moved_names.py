"""config.yaml of older runs, whose recollection was a detector of its own."""

from __future__ import annotations

import pytest
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from detection_toolkit.config import get_config
from sqr import selective_schedule
from stageinteractor import StageInteractor


@pytest.mark.parametrize("batched", [None, False])
def test_an_older_run_gets_the_route(tmp_path, batched):
    cfg = get_config("sqr/adamixer_sqr_shapes_tiny.py")
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    older = OmegaConf.load(tmp_path / "config.yaml")
    schedule = older.model.decoder.pop("route").schedule
    older.model._target_ = "sqr.RecollectionDetector"
    older.model.schedule = {
        "_target_": schedule._target_,
        "num_stages": "${..decoder.num_stages}",
    }
    if batched is not None:
        older.model.batched = batched
    OmegaConf.save(older, tmp_path / "config.yaml")

    model = instantiate(get_config(str(tmp_path / "config.yaml")).model)
    assert type(model) is StageInteractor
    assert model.decoder.route.schedule == selective_schedule(model.decoder.num_stages)
    assert model.decoder.route.batched is (batched is None)
