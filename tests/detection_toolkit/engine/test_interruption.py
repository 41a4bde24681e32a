"""Evaluations that an interruption has prevented, and runs that are asked to end within one."""

import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from patience import wait_until
from small_runs import make_config

from detection_toolkit.data import LoaderProcessError
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.engine.interruption import EXIT_INTERRUPTED, InterruptedRun
from detection_toolkit.engine.random_states import (
    capture_random_state,
    preserved_random_state,
    restore_random_state,
)

OPTIONS = ["train.max_iter=6", "train.eval_period=2", "train.checkpointer.period=2"]


def run(folder, resume=False):
    trainer = Trainer(prepare_config(make_config(folder, *OPTIONS)))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def evaluations(monkeypatch, script):
    """Each evaluation of a run does what the next function of a script does."""
    script = iter(script)

    def test(cls, cfg, model):
        return {"bbox": {"AP": next(script)()}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))


def value(number):
    return lambda: number


def fail():
    raise KeyboardInterrupt  # as if it were killed


def test_an_evaluation_that_never_happened_is_made_up_for(tmp_path, monkeypatch):
    evaluations(monkeypatch, [value(10.0), fail])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    output = tmp_path / "output"
    assert json.loads((output / "last_evaluation.json").read_text()) == {"iterations": 2}
    evaluations(monkeypatch, [value(30.0), value(20.0)])
    run(tmp_path, resume=True)
    record = {"metric": "bbox/AP", "value": 30.0, "iteration": 3, "weights": "plain"}
    assert json.loads((output / "model_best.json").read_text()) == record
    best = torch.load(output / "model_best.pth", weights_only=True)
    assert best["iteration"] == 3
    # What is there already is not done again: nothing is left of this script but the last.
    (output / "last_checkpoint").write_text("model_0000003.pth")
    evaluations(monkeypatch, [value(25.0)])
    run(tmp_path, resume=True)
    assert json.loads((output / "model_best.json").read_text()) == record


def test_a_signal_within_an_evaluation_ends_the_run_at_once(tmp_path, monkeypatch):
    test = Trainer.test.__func__

    def signal_and_test(cls, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return test(cls, *args, **kwargs)

    monkeypatch.setattr(Trainer, "test", classmethod(signal_and_test))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRun) as end:
        run(tmp_path)
    assert end.value.code == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) == before
    output = tmp_path / "output"
    assert (output / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (output / "last_evaluation.json").exists()
    assert not list(output.glob("inference/*/metrics.json"))
    monkeypatch.undo()
    trainer = run(tmp_path, resume=True)
    assert trainer.start_iter == 2
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [1, 3, 6]


@pytest.fixture
def new_processes():
    """Processes that were started since then; earlier tests may have left some."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


@pytest.fixture
def killing_forward(new_processes):
    """A forward pass whose loader is killed meanwhile, as by a system short of memory."""

    def forward(self, images):
        (loader,) = new_processes()
        loader.kill()
        wait_until(lambda: False, "its end is noticed")

    return forward


@pytest.mark.parametrize("part, name", [("train", "training"), ("test", "test")])
def test_a_dead_loader_is_explained_wherever_the_run_is(
    tmp_path, monkeypatch, killing_forward, part, name
):
    cfg = prepare_config(make_config(tmp_path, f"dataloader.{part}.num_workers=1"))
    trainer = Trainer(cfg)
    monkeypatch.setattr(type(trainer.model), "forward", killing_forward)
    message = rf"process of the {name} data .* lower dataloader\.{part}\.num_workers"
    with pytest.raises(LoaderProcessError, match=message):
        if part == "train":
            trainer.train()
        else:
            Trainer.test(cfg, trainer.model)


def test_a_signal_to_all_within_an_evaluation_leaves_its_loaders_to_it(
    tmp_path, monkeypatch, new_processes
):
    """They would end first, and the evaluation with an error."""
    test = Trainer.test.__func__

    def signal_and_test(cls, cfg, model, **kwargs):
        forward = model.forward

        def signal_and_forward(images):
            for process in new_processes():
                process.terminate()
            time.sleep(0.2)  # for them to end
            os.kill(os.getpid(), signal.SIGTERM)
            return forward(images)

        monkeypatch.setattr(model, "forward", signal_and_forward)
        return test(cls, cfg, model, **kwargs)

    options = [*OPTIONS, "dataloader.test.num_workers=1"]
    trainer = Trainer(prepare_config(make_config(tmp_path, *options)))
    monkeypatch.setattr(Trainer, "test", classmethod(signal_and_test))
    with pytest.raises(InterruptedRun):
        trainer.train()


def test_a_failed_run_is_not_evaluated(tmp_path, monkeypatch):
    """Detectron2 would do so after a failure in the last step."""
    evaluations(monkeypatch, [value(1.0), value(1.0)])
    trainer = Trainer(prepare_config(make_config(tmp_path, *OPTIONS)))
    step = trainer.run_step

    def run_step():
        if trainer.iter == 5:
            raise ZeroDivisionError
        step()

    monkeypatch.setattr(trainer, "run_step", run_step)
    with pytest.raises(ZeroDivisionError):
        trainer.train()


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_survive_a_file(tmp_path):
    torch.save(capture_random_state(), tmp_path / "state.pth")
    expected = [draw(), draw()]
    restore_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    with preserved_random_state():
        draw()
    assert [draw(), draw()] == expected


def test_deterministic_algorithms_are_asked_for_during_training_only(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "detection_toolkit.engine.trainer.TrainerBase.train",
        lambda *args: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    for value in ("true", "false"):
        cfg = make_config(tmp_path, f"train.deterministic={value}")
        Trainer(prepare_config(cfg)).train()
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()
