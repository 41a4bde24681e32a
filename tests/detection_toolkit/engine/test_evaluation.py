"""Evaluations of a run: what they know, who is asked, and the best checkpoint."""

import copy
import json
import logging
import os
import re
import signal

import pytest
import torch
from small_runs import make_config

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.engine import EvaluationFacts, Trainer, prepare_config
from detection_toolkit.engine import evaluation as evaluation_module
from detection_toolkit.engine.hooks import BestCheckpoint
from detection_toolkit.engine.interruption import InterruptedRun
from detection_toolkit.errors import NonFinitePredictionError
from detection_toolkit.modeling import QueryDetector

PERIODIC = ["train.max_iter=4", "train.eval_period=2", "train.checkpointer.period=2"]


def run(kind, folder, *overrides, resume=False):
    trainer = kind(prepare_config(make_config(folder, *PERIODIC, *overrides)))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


class OwnTest(Trainer):
    """Overrides ``test`` with the signature that it has in Detectron2."""

    calls = 0

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.calls += 1
        return {"bbox": {"AP": float(cls.calls)}}


def test_a_trainer_may_have_a_test_of_its_own(tmp_path):
    OwnTest.calls = 0
    run(OwnTest, tmp_path)
    assert OwnTest.calls == 2
    record = json.loads((tmp_path / "output" / "model_best.json").read_text())
    assert (record["value"], record["iteration"]) == (2.0, 4)


class MoreMetrics(Trainer):
    """Extends ``test``, with Detectron2's signature."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        results = super().test(cfg, model, evaluators)
        results["bbox"]["half"] = results["bbox"]["AP"] / 2
        return results


@pytest.fixture
def by_stage(monkeypatch):
    """The facts that evaluations by stage were given."""
    calls = []
    evaluate_stages = evaluation_module.evaluate_stages

    def listen(*args, **kwargs):
        calls.append(kwargs["facts"])
        return evaluate_stages(*args, **kwargs)

    monkeypatch.setattr(evaluation_module, "evaluate_stages", listen)
    return calls


def test_an_extended_test_knows_the_facts_of_the_run(tmp_path, by_stage):
    run(MoreMetrics, tmp_path, "train.stage_evaluation=true", "train.ema.enabled=true")
    assert by_stage == [{"weights": "plain"}, {"weights": "averaged"}]  # only at the end
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    assert sum("bbox/half" in json.loads(line) for line in lines) == 2


def test_an_extended_test_is_interrupted_within(tmp_path, monkeypatch):
    forward = []

    class Signalled(MoreMetrics):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            os.kill(os.getpid(), signal.SIGTERM)
            model.register_forward_hook(lambda *args: forward.append(1))
            return super().test(cfg, model, evaluators)

    with pytest.raises(InterruptedRun):
        run(Signalled, tmp_path)
    assert not forward  # not even for the first image
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "output" / "last_evaluation.json").exists()


def test_facts_do_not_outlive_the_evaluation_of_a_run(tmp_path):
    cfg = prepare_config(make_config(tmp_path, "train.stage_evaluation=true"))
    of_config = EvaluationFacts(averaged=False, by_stage=True)
    assert EvaluationFacts.current(cfg) == of_config
    of_run = EvaluationFacts(averaged=True, by_stage=False)
    with pytest.raises(ZeroDivisionError), of_run.of_run():
        assert EvaluationFacts.current(cfg) == of_run
        raise ZeroDivisionError
    assert EvaluationFacts.current(cfg) == of_config


def test_what_is_told_goes_before_what_the_config_asks_for(tmp_path, by_stage):
    cfg = prepare_config(make_config(tmp_path, "train.stage_evaluation=true"))
    before = copy.deepcopy(cfg)
    facts = EvaluationFacts(averaged=True, by_stage=False)
    Trainer.test(cfg, Trainer.build_model(cfg), facts=facts)
    assert cfg == before and not by_stage
    (path,) = (tmp_path / "output").glob("inference/*/metrics.json")
    assert json.loads(path.read_text())["weights"] == "averaged"


def best_checkpoint(folder, mode="max"):
    return BestCheckpoint(Checkpointer(torch.nn.Linear(1, 1), str(folder)), "bbox/AP", mode=mode)


@pytest.mark.parametrize(
    "mode, values, best",
    [
        ("max", [1.0, 3.0, 2.0], (3.0, 1)),
        ("min", [2.0, 1.0, 3.0], (1.0, 1)),
        ("max", [float("nan"), -1.0, float("nan"), float("inf")], (-1.0, 1)),
        ("min", [float("nan"), 2.0, float("-inf"), 1.0], (1.0, 3)),
        ("max", [1.0, 1.0], (1.0, 0)),
    ],
)
def test_the_best_value_is_kept(tmp_path, caplog, mode, values, best):
    caplog.set_level(logging.INFO, logger="detection_toolkit")
    kept = best_checkpoint(tmp_path, mode)
    for iteration, value in enumerate(values):
        kept.update({"bbox/AP": (value, iteration)}, max_iter=len(values) - 1)
    # The last is recorded under the number of iterations, those before under that less one.
    last = len(values) - 1
    said = re.findall(r"bbox/AP is .* after (\d+) iterations", caplog.text)
    assert said == [str(i) for i in (*range(1, last + 1), last)]
    assert (kept.value, kept.iteration) == best
    checkpoint = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert checkpoint["iteration"] == best[1]
    # Another run goes on from it.
    resumed = best_checkpoint(tmp_path, mode)
    resumed.restore()
    assert (resumed.value, resumed.iteration) == best


def test_without_a_number_there_is_no_best_checkpoint(tmp_path, caplog):
    kept = best_checkpoint(tmp_path)
    kept.update({"bbox/AP": (float("nan"), 0)}, max_iter=3)
    kept.update({"segm/AP": (1.0, 1)}, max_iter=3)
    assert "the evaluation has no metric bbox/AP" in caplog.text
    assert kept.value is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"metric": "bbox/AP"}'])
def test_a_damaged_record_of_the_best_value_is_said(tmp_path, caplog, text):
    (tmp_path / "model_best.json").write_text(text)
    kept = best_checkpoint(tmp_path)
    kept.restore()
    assert "model_best.json is damaged: the best value is sought anew" in caplog.text
    assert kept.value is None


@pytest.fixture
def diverging(monkeypatch):
    """Evaluations so many of which see boxes that are NaN; those that follow are sound."""
    left = {"evaluations": 1}
    predict, evaluate = QueryDetector.predict, evaluation_module.run_evaluator

    def spoilt(self, images, truth=None):
        predictions = predict(self, images, truth)
        if self.training or left["evaluations"] <= 0:
            return predictions
        stages = [s._replace(boxes=s.boxes * float("nan")) for s in predictions.stages]
        return predictions._replace(stages=tuple(stages))

    def counted(*args):
        try:
            return evaluate(*args)
        finally:
            left["evaluations"] -= 1

    monkeypatch.setattr(QueryDetector, "predict", spoilt)
    monkeypatch.setattr(evaluation_module, "run_evaluator", counted)
    return left


def test_a_periodic_evaluation_without_finite_predictions_is_left_out(tmp_path, diverging, caplog):
    trainer = run(Trainer, tmp_path)
    assert trainer.iter == 4
    assert "the evaluation is left out: Predictions are NaN or infinite" in caplog.text
    # The last one is sound.
    assert json.loads((tmp_path / "output" / "model_best.json").read_text())["iteration"] == 4


def test_the_last_evaluation_without_finite_predictions_is_an_error(tmp_path, diverging):
    diverging["evaluations"] = 2
    with pytest.raises(NonFinitePredictionError, match="stage 2 of image .*1.png"):
        run(Trainer, tmp_path)
    assert (tmp_path / "output" / "model_final.pth").is_file()


def test_a_resumed_run_does_not_end_at_the_evaluation_that_it_makes_up_for(
    tmp_path, diverging, caplog
):
    diverging["evaluations"] = 0
    cfg = prepare_config(make_config(tmp_path, *PERIODIC))
    trainer = Trainer(cfg)
    trainer.max_iter = 2
    trainer.train()
    (tmp_path / "output" / "last_evaluation.json").unlink(missing_ok=True)
    diverging["evaluations"] = 1
    resumed = run(Trainer, tmp_path, resume=True)
    assert (resumed.start_iter, resumed.iter) == (2, 4)
    assert trainer.iter == 2
    assert "the evaluation is left out" in caplog.text
