"""A run of the trainer: it resumes exactly, and is evaluated by stage and by refiner."""

from __future__ import annotations

import json

import torch
from detectron2.utils.env import seed_all_rng
from hpr_models import CONFIG, RUN
from small_runs import run_overrides

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine import Trainer, prepare_config


def run(folder, *overrides, stop=4, resume=False):
    common = [x for x in run_overrides(folder, num_images=7) if not x.startswith("model.")]
    cfg = apply_overrides(get_config(CONFIG), [*common, *RUN, *overrides])
    trainer = Trainer(prepare_config(cfg))
    trainer.resume_or_load(resume=resume)
    trainer.max_iter = stop
    trainer.train()
    return trainer


def test_a_run_in_two_parts_equals_a_run_in_one(tmp_path):
    accumulated = "train.accumulation_steps=2"
    seed_all_rng(7)
    whole = run(tmp_path / "whole", accumulated)
    seed_all_rng(7)
    run(tmp_path / "parts", accumulated, stop=2)
    seed_all_rng(8)
    resumed = run(tmp_path / "parts", accumulated, resume=True)
    assert (resumed.start_iter, resumed.iter) == (2, 4)
    states = [t.checkpointer.model.state_dict() for t in (whole, resumed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_each_auxiliary_head_has_its_ap_at_each_stage(tmp_path):
    trainer = run(tmp_path, "train.max_iter=1", "train.stage_evaluation=true", stop=1)
    assert not trainer.model.decoder.predicts_auxiliary
    (file,) = (tmp_path / "output").glob("inference/*/stage_metrics.json")
    metrics = json.loads(file.read_text())
    assert len(metrics["stages"]) == 2
    assert list(metrics["auxiliary"]) == ["regional", "dynamic"]
    for stages in metrics["auxiliary"].values():
        assert [x["stage"] for x in stages] == [1, 2]
        assert all(0 <= x["AP"] <= 100 for x in stages)
