"""The detector with recollection: same weights and inference as the plain one, one config line."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.config import instantiate
from small_runs import make_batch, run_overrides
from sqr_models import NUM_STAGES, SMALL, make_plain, with_recollection

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine import Trainer, prepare_config
from sqr import ScheduleError, dense_schedule, selective_schedule

CONFIGS = {
    "adamixer": "sqr/adamixer_sqr_shapes_tiny.py",
    "stageinteractor": "sqr/stageinteractor_sqr_shapes_tiny.py",
}


def load(family, *overrides):
    return apply_overrides(get_config(CONFIGS[family]), [*SMALL[family], *overrides])


@pytest.mark.parametrize("family", CONFIGS)
def test_inference_is_the_plain_detectors(family):
    plain = make_plain(family).eval()
    detector = with_recollection(plain, selective_schedule(NUM_STAGES)).eval()
    batch = make_batch([1, 1])
    with torch.no_grad():
        for ours, expected in zip(detector(batch), plain(batch)):
            ours, expected = ours["instances"], expected["instances"]
            assert torch.equal(ours.pred_boxes.tensor, expected.pred_boxes.tensor)
            assert torch.equal(ours.scores, expected.scores)
            assert torch.equal(ours.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_go_from_one_detector_to_the_other(family, tmp_path):
    plain = make_plain(family, dtype=torch.float32)
    detector = instantiate(load(family).model)
    assert list(detector.state_dict()) == list(plain.state_dict())
    Checkpointer(plain, str(tmp_path)).save("plain")
    Checkpointer(detector).load(str(tmp_path / "plain.pth"))
    for name, value in plain.state_dict().items():
        assert torch.equal(detector.state_dict()[name], value), name


@pytest.mark.parametrize("family", CONFIGS)
def test_the_schedule_follows_the_number_of_stages(family):
    detector = instantiate(load(family, "model.decoder.num_stages=5").model)
    assert detector.decoder.route.schedule == selective_schedule(5)
    late = instantiate(load(family, "model.decoder.route.schedule.late_start=2").model)
    assert late.decoder.route.schedule == selective_schedule(NUM_STAGES, late_start=2)
    dense = instantiate(
        load(family, "model.decoder.route.schedule._target_=sqr.dense_schedule").model
    )
    assert dense.decoder.route.schedule == dense_schedule(NUM_STAGES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.decoder.route.schedule.num_stages=6", "slice for stage 4, which the decoder lacks"),
        ("model.decoder.route.schedule.num_stages=2", "stage 2 of the decoder has no slice"),
        ("model.decoder.route.schedule.late_start=3", "the last stage is 3"),
        (
            "model.decoder.route.schedule=null",
            "model.decoder.route.schedule must be a schedule, such as .* it is None",
        ),
    ],
)
def test_schedules_that_do_not_fit_are_refused_when_the_config_is_built(override, message):
    # Detectron2 says which object it was about to build, and then the error.
    with pytest.raises(ScheduleError, match=message):
        instantiate(load("adamixer", override).model)


def test_slices_can_be_written_out_in_a_config():
    cfg = load("adamixer")
    cfg.model.decoder.route.schedule = dict(
        _target_="sqr.RecollectionSchedule", starts=[0, 0, 1, 2], ends=[1, 2, 4, 7]
    )
    assert instantiate(cfg.model).decoder.route.schedule == selective_schedule(4)
    cfg.model.decoder.route.schedule.ends[2] = 3
    with pytest.raises(ScheduleError, match="stage 2 .* drops the plain cascade"):
        instantiate(cfg.model)


def test_without_a_criterion_it_is_for_inference_only():
    plain = make_plain("adamixer")
    plain.criterion = None
    detector = with_recollection(plain, selective_schedule(NUM_STAGES))
    assert detector.criterion is None
    assert len(detector.eval()(make_batch([1]))) == 1


@pytest.mark.parametrize("family", CONFIGS)
def test_a_run_trains_and_evaluates(family, tmp_path):
    cfg = load(
        family,
        *(x for x in run_overrides(tmp_path) if not x.startswith("model.decoder")),
        *SMALL[family],
        "train.max_iter=2",
        "train.accumulation_steps=2",
        "model.execution.checkpoint=true",
        "train.stage_evaluation=true",
    )
    cfg = prepare_config(cfg)
    trainer = Trainer(cfg)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) > len(before) // 2
    metrics = (tmp_path / "output" / "metrics.json").read_text()
    assert f'"stage{NUM_STAGES - 1}/matched_accuracy"' in metrics
    (stages,) = (tmp_path / "output").glob("inference/*/stage_metrics.json")
    assert len(json.loads(stages.read_text())["stages"]) == NUM_STAGES
