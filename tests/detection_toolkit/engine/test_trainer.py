import copy
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from small_runs import data_overrides, make_config, run_overrides

from detection_toolkit.checkpoint.checkpointer import (
    Checkpointer,
    ResumeError,
    find_checkpoint,
    inference_weights,
)
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.data import dataset_names
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.engine.evaluation import better_weights, prefer_results_of
from detection_toolkit.engine.hooks import EvaluationHook, build_ema
from detection_toolkit.engine.interruption import InterruptedRun
from detection_toolkit.engine.train_loop import DetectionTrainLoop
from detection_toolkit.errors import NonFinitePredictionError, UserError


def train(cfg, resume=False):
    prepare_config(cfg)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_a_run_writes_what_detectron2_runs_write(tmp_path):
    cfg = make_config(tmp_path, "train.eval_period=2", "train.checkpointer.max_to_keep=1")
    trainer = train(cfg)
    output = tmp_path / "output"
    names = {p.name for p in output.iterdir()}
    assert {"metrics.json", "model_final.pth", "model_best.pth", "last_checkpoint"} <= names
    assert any(n.startswith("events.out.tfevents") for n in names)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert {"total_loss", "loss_cls", "stage0/cls", "lr", "grad_norm"} <= set(lines[0])
    assert any("bbox/AP" in line for line in lines)
    assert trainer.cfg.model.num_classes == 3  # follows the JSON
    (metrics,) = output.glob("inference/*/metrics.json")
    assert json.loads(metrics.read_text())["classes"] == ["cat", "dog", "bird"]


def assert_same_state(first, second):
    """Weights, averages and the optimiser's moments, to the last bit."""
    for name in ("checkpointer", "ema"):
        states = [
            (getattr(t, name).model if name == "checkpointer" else getattr(t, name)).state_dict()
            for t in (first, second)
        ]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert torch.equal(states[1][key], value), key
    moments = [t.optimizer.state_dict()["state"] for t in (first, second)]
    assert moments[0].keys() == moments[1].keys()
    for key, state in moments[0].items():
        for name, value in state.items():
            assert torch.equal(moments[1][key][name], value), (key, name)


@pytest.mark.parametrize("data", ["plain", pytest.param("pairs", marks=pytest.mark.slow)])
def test_a_run_in_two_parts_equals_a_run_in_one(tmp_path, data):
    options = [
        *("train.ema.enabled=true", "train.ema.decay=0.5"),
        # The schedule covers the whole run, of which the first part is cut short.
        "train.max_iter=4",
    ]

    def run(folder, *, stop=4, resume=False):
        cfg = make_config(folder, *options, num_images=7)
        if data == "pairs":
            mapper = get_config("common/data/shapes_lsj.py").dataloader.train.mapper
            cfg.dataloader.train.mapper = mapper
            cfg.dataloader.train.aspect_ratio_grouping = False
            cfg.dataloader.train.num_workers = 2 if resume else 0
            cfg.train.accumulation_steps = 2
        trainer = Trainer(prepare_config(cfg))
        trainer.resume_or_load(resume=resume)
        trainer.max_iter = stop
        trainer.train()
        return trainer

    seed_all_rng(7)
    whole = run(tmp_path / "whole")
    seed_all_rng(7)
    part = run(tmp_path / "parts", stop=2)
    assert not torch.equal(
        part.ema.module.initial_queries.content.weight,
        whole.ema.module.initial_queries.content.weight,
    )
    seed_all_rng(8)
    resumed = run(tmp_path / "parts", resume=True)
    assert (resumed.start_iter, resumed.iter) == (2, 4)
    assert resumed.scheduler.last_epoch == whole.scheduler.last_epoch == 4
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert_same_state(whole, resumed)


def test_nothing_to_resume_is_said(tmp_path, caplog):
    trainer = Trainer(prepare_config(make_config(tmp_path)))
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        trainer.resume_or_load(resume=True)
    assert "holds nothing to resume" in caplog.text
    assert trainer.start_iter == 0


def test_machines_that_see_different_checkpoints_are_refused(tmp_path, monkeypatch):
    train(make_config(tmp_path, "train.max_iter=1"))
    trainer = Trainer(prepare_config(make_config(tmp_path)))
    monkeypatch.setattr(comm, "all_gather", lambda start: [start, 0])
    with pytest.raises(ResumeError, match=r"\[1, 0\].*all machines must see the same files"):
        trainer.resume_or_load(resume=True)


def test_what_cannot_be_repeated_is_named_where_runs_must_repeat(tmp_path, monkeypatch):
    def step(self):
        raise RuntimeError(
            "grid_sampler_2d_backward_cuda does not have a deterministic implementation, but"
        )

    monkeypatch.setattr(DetectionTrainLoop, "run_step", step)
    trainer = Trainer(prepare_config(make_config(tmp_path, "train.deterministic=true")))
    with pytest.raises(UserError, match="grid_sampler_2d_backward_cuda adds .*sampling=auto"):
        trainer.train()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_interrupted_run_logs_the_steps_since_the_last_time(tmp_path):
    cfg = make_config(tmp_path, "train.log_period=3", "train.max_iter=8")
    trainer = Trainer(cfg)

    class Interrupt(HookBase):
        def after_step(self):
            if self.trainer.iter == 4:
                raise InterruptedRun

    trainer.register_hooks([Interrupt()])
    with pytest.raises(InterruptedRun):
        trainer.train()
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    assert [json.loads(x)["iteration"] for x in lines if "total_loss" in x] == [2, 4]


def test_the_average_is_stored_and_evaluated(tmp_path, caplog):
    cfg = make_config(tmp_path, "train.ema.enabled=true", "train.eval_period=4")
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        train(cfg)
    assert "evaluating the averaged (EMA) weights" in caplog.text
    checkpoint = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    averaged = inference_weights(checkpoint)
    assert averaged.keys() == checkpoint["model"].keys()
    assert not torch.equal(
        averaged["decoder.stages.0.box_tower.out.weight"],
        checkpoint["model"]["decoder.stages.0.box_tower.out.weight"],
    )
    plain = inference_weights(checkpoint, prefer_ema=False)
    assert plain.keys() == checkpoint["model"].keys()
    assert all(torch.equal(plain[name], value) for name, value in checkpoint["model"].items())


def test_results_of_plain_weights_do_not_overwrite_those_of_averaged_ones(tmp_path):
    cfg = prepare_config(make_config(tmp_path, "train.ema.enabled=true"))
    model = Trainer.build_model(cfg)
    Trainer.test(cfg, model)
    (path,) = (tmp_path / "output").glob("inference/*/metrics.json")
    assert json.loads(path.read_text())["weights"] == "averaged"
    cfg.train.ema.enabled = False
    Trainer.test(cfg, model)
    assert json.loads(path.read_text())["weights"] == "plain"
    assert json.loads(path.with_name("metrics_averaged.json").read_text())["weights"] == "averaged"


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_warms_up_with_the_length_of_the_run(warmup):
    model = torch.nn.Linear(1, 1, bias=False).double()
    averaged = build_ema(model, 0.75, warmup=warmup)
    expected = None
    for step in range(60):
        torch.nn.init.constant_(model.weight, float(step))
        averaged.update_parameters(model)
        kept = min(0.75, (1 + step) / (10 + step)) if warmup else 0.75
        expected = step if step == 0 else kept * expected + (1 - kept) * step
        assert float(averaged.module.weight) == pytest.approx(expected, rel=1e-12)


def test_plain_and_averaged_weights_are_evaluated_and_the_better_ones_count(
    tmp_path, monkeypatch, caplog
):
    options = ["train.eval_period=2", "train.ema.enabled=true", "train.ema.decay=0.5"]
    # Of the plain and the averaged weights, after two steps and after four.
    scripted_evaluation(monkeypatch, [30.0, 20.0, 10.0, 40.0])
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        trainer = train(make_config(tmp_path, *options))
    output = tmp_path / "output"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    names = ("bbox/AP", "plain/bbox/AP", "averaged/bbox/AP")
    values = [[line[name] for name in names] for line in lines if "bbox/AP" in line]
    assert values == [[30.0, 30.0, 20.0], [40.0, 10.0, 40.0]]
    assert "bbox/AP is 30 with the plain weights, 20 with the averaged weights" in caplog.text
    assert "the plain ones count" in caplog.text and "the averaged ones count" in caplog.text
    assert trainer.evaluated_weights == "averaged"
    best = torch.load(output / "model_best.pth", weights_only=True)
    assert (best["weights"], best["value"]) == ("averaged", 40.0)
    for key, value in trainer.ema.module.state_dict().items():
        assert torch.equal(best["model"][key], value), key
    # Whoever reads it gets them, whether averaged weights are asked for or not.
    for prefer in (True, False):
        checkpointer = Checkpointer(Trainer.build_model(trainer.cfg), prefer_ema=prefer)
        checkpointer.load(str(output / "model_best.pth"))
        assert checkpointer.loaded_ema
    # It is not what a run goes on from.
    (output / "last_checkpoint").write_text("model_best.pth")
    with pytest.raises(ResumeError, match="holds the weights of the best evaluation alone"):
        Trainer(trainer.cfg).resume_or_load(resume=True)


def test_the_best_checkpoint_has_the_plain_weights_where_they_are_better(tmp_path, monkeypatch):
    scripted_evaluation(monkeypatch, [30.0, 20.0])
    options = ["train.eval_period=4", "train.ema.enabled=true", "train.ema.decay=0.9"]
    trainer = train(make_config(tmp_path, *options))
    best = torch.load(tmp_path / "output" / "model_best.pth", weights_only=True)
    assert best["weights"] == "plain"
    key = "decoder.stages.0.box_tower.out.weight"
    assert torch.equal(best["model"][key], trainer.checkpointer.model.state_dict()[key])
    assert not torch.equal(best["model"][key], trainer.ema.module.state_dict()[key])
    checkpointer = Checkpointer(Trainer.build_model(trainer.cfg), prefer_ema=True)
    checkpointer.load(str(tmp_path / "output" / "model_best.pth"))
    assert not checkpointer.loaded_ema


@pytest.mark.parametrize(
    "plain, averaged, mode, better",
    [
        (30.0, 20.0, "max", "plain"),
        (30.0, 20.0, "min", "averaged"),
        (20.0, 20.0, "max", "averaged"),
        (float("nan"), 20.0, "max", "averaged"),
        (20.0, float("nan"), "max", "plain"),
        (float("nan"), float("nan"), "max", "averaged"),
    ],
)
def test_the_better_weights(plain, averaged, mode, better):
    results = {"plain": {"bbox": {"AP": plain}}, "averaged": {"bbox": {"AP": averaged}}}
    assert better_weights(results, "bbox/AP", mode=mode) == better


def test_the_files_of_the_better_weights_have_the_plain_names(tmp_path):
    options = ["train.ema.enabled=true", "train.stage_evaluation=true", "train.eval_period=2"]
    cfg = prepare_config(make_config(tmp_path, *options))
    trainer = train(cfg)
    (folder,) = (tmp_path / "output").glob("inference/*")
    both = {"plain", "averaged"}
    names = ("metrics", "stage_metrics")
    for counts in (trainer.evaluated_weights, *sorted(both)):
        prefer_results_of(cfg, counts)
        (other,) = both - {counts}
        for name in names:
            assert json.loads((folder / f"{name}.json").read_text())["weights"] == counts
            kept = folder / f"{name}_{other}.json"
            assert json.loads(kept.read_text())["weights"] == other
            assert not (folder / f"{name}_{counts}.json").exists()
        assert (folder / "coco_instances_results.json").is_file()
        assert (folder / f"coco_instances_results_{other}.json").is_file()


def test_the_average_alone_is_evaluated_where_nothing_is_to_be_compared(tmp_path, monkeypatch):
    scripted_evaluation(monkeypatch, [20.0])
    options = ["train.eval_period=4", "train.ema.enabled=true", "train.ema.compare=false"]
    train(make_config(tmp_path, *options))
    best = torch.load(tmp_path / "output" / "model_best.pth", weights_only=True)
    assert (best["weights"], best["value"]) == ("averaged", 20.0)


@pytest.mark.parametrize("broken", [{"plain"}, {"plain", "averaged"}])
def test_weights_that_can_be_evaluated_are(tmp_path, monkeypatch, caplog, broken):
    def evaluate(cls, cfg, model):
        weights = "averaged" if model is trainer.ema.module else "plain"
        if weights in broken:
            raise NonFinitePredictionError([(0, 0)], images=["a.png"])
        return {"bbox": {"AP": 20.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    trainer = Trainer(prepare_config(make_config(tmp_path, "train.ema.enabled=true")))
    if broken == {"plain"}:
        assert trainer._test_and_save_results()["bbox"]["AP"] == 20.0
        assert trainer.evaluated_weights == "averaged"
        assert "the plain weights are not evaluated" in caplog.text
    else:
        with pytest.raises(NonFinitePredictionError):
            trainer._test_and_save_results()


def test_a_decay_outside_of_zero_and_one_is_refused(tmp_path):
    cfg = make_config(tmp_path, "train.ema.enabled=true", "train.ema.decay=1.5")
    with pytest.raises(ValueError, match="train.ema.decay"):
        Trainer(prepare_config(cfg))


def scripted_evaluation(monkeypatch, values):
    """The evaluations of a run have these APs, one after the other."""
    values = iter(values)
    results = classmethod(lambda cls, cfg, model: {"bbox": {"AP": next(values)}})
    monkeypatch.setattr(Trainer, "test", results)


def test_the_best_checkpoint_is_kept_also_by_a_resumed_run(tmp_path, monkeypatch):
    options = ["train.eval_period=1", "train.checkpointer.period=1"]
    best = tmp_path / "output" / "model_best.pth"
    scripted_evaluation(monkeypatch, [30.0, 20.0])
    train(make_config(tmp_path, "train.max_iter=2", *options))
    assert torch.load(best, weights_only=True)["iteration"] == 0
    # As if the run had been killed right after its second step, before the evaluation of it.
    scripted_evaluation(monkeypatch, [20.0, 25.0, 40.0])
    train(make_config(tmp_path, "train.max_iter=4", *options), resume=True)
    # What is evaluated after the last iteration counts, for Detectron2, as the one after it.
    assert torch.load(best, weights_only=True)["iteration"] == 4
    record = {"metric": "bbox/AP", "value": 40.0, "iteration": 4, "weights": "plain"}
    assert json.loads(best.with_suffix(".json").read_text()) == record
    scripted_evaluation(monkeypatch, [40.0, 39.0])
    train(make_config(tmp_path, "train.max_iter=5", *options), resume=True)
    assert json.loads(best.with_suffix(".json").read_text()) == record
    # Another run in the same folder has its own best.
    scripted_evaluation(monkeypatch, [5.0])
    train(make_config(tmp_path, "train.max_iter=1", *options))
    assert json.loads(best.with_suffix(".json").read_text())["value"] == 5.0


def test_a_run_that_gets_no_better_ends_early_also_after_it_was_resumed(
    tmp_path, monkeypatch, caplog
):
    options = [
        *("train.max_iter=20", "train.eval_period=1", "train.checkpointer.period=1"),
        *("train.early_stopping.enabled=true", "train.early_stopping.patience=3"),
    ]
    # The best is the second: the run ends after the fifth.
    scripted_evaluation(monkeypatch, [10.0, 30.0, 20.0, 20.0, 30.0])
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        trainer = train(make_config(tmp_path, *options))
    output = tmp_path / "output"
    assert "bbox/AP has not got better in the last 3 evaluations" in caplog.text
    assert "done: 5 iterations" in caplog.text
    assert trainer.iter == 4
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 4
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [x["bbox/AP"] for x in lines if "bbox/AP" in x] == [10.0, 30.0, 20.0, 20.0, 30.0]
    # Nothing is evaluated, and no step is made.
    scripted_evaluation(monkeypatch, [])
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        assert train(make_config(tmp_path, *options), resume=True).iter == 5
    assert "done: 5 iterations" in caplog.text
    # Cut off after four steps it knows that two evaluations were not the best.
    (output / "last_checkpoint").write_text("model_0000003.pth")
    scripted_evaluation(monkeypatch, [29.0])
    (output / "last_evaluation.json").write_text('{"iterations": 4}')
    assert train(make_config(tmp_path, *options), resume=True).iter == 4
    # A better one begins the count anew.
    (output / "last_checkpoint").write_text("model_0000003.pth")
    (output / "last_evaluation.json").write_text('{"iterations": 4}')
    scripted_evaluation(monkeypatch, [31.0, 1.0, 2.0, 3.0])
    assert train(make_config(tmp_path, *options), resume=True).iter == 7


def test_early_stopping_needs_what_it_goes_by(tmp_path):
    for lacks in ("train.eval_period=0", "train.best_checkpointer.enabled=false"):
        cfg = make_config(
            tmp_path, "train.eval_period=1", lacks, "train.early_stopping.enabled=true"
        )
        with pytest.raises(ValueError, match="train.early_stopping needs train.best_checkpointer"):
            Trainer(prepare_config(cfg))


def test_frozen_parameters_stay_as_they_are(tmp_path):
    cfg = make_config(tmp_path, "train.freeze=['backbone.*','*.class_tower.*']")
    trainer = Trainer(prepare_config(cfg))
    model = trainer.checkpointer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {n for n in before if n.startswith("backbone.") or ".class_tower." in n}
    assert frozen and not changed & frozen
    assert "initial_queries.content.weight" in changed
    assert len(trainer.optimizer.param_groups[0]["params"]) == len(before) - len(frozen)


@pytest.mark.parametrize(
    "names, message",
    [
        ("['bakbone.*']", r"no parameter's name fits 'bakbone\.\*'; they begin with backbone, "),
        ("['*']", "leaves nothing to train"),
        ("backbone.*", "train.freeze must be a list, got 'backbone"),
        ("[1]", "train.freeze must be a list of names"),
    ],
)
def test_names_that_freeze_nothing_or_all_are_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        Trainer(prepare_config(make_config(tmp_path, f"train.freeze={names}")))


def test_a_length_in_epochs(tmp_path):
    def prepared(*overrides):
        given = ["train.max_iter=100", "train.eval_period=10", "train.checkpointer.period=50"]
        # Seven images in batches of two.
        cfg = make_config(tmp_path, *given, *overrides, num_images=7)
        return prepare_config(cfg, overrides)

    train_node = prepared("train.max_epochs=2").train
    assert (train_node.max_iter, train_node.eval_period) == (7, 1)
    train_node = prepared("train.max_epochs=200").train
    assert train_node.max_iter == 700
    assert (train_node.eval_period, train_node.checkpointer.period) == (70, 350)
    train_node = prepared("train.max_epochs=200", "train.eval_period=3").train
    assert (train_node.eval_period, train_node.checkpointer.period) == (3, 350)
    assert prepared("train.max_epochs=20", "train.accumulation_steps=4").train.max_iter == 18
    # Again, as from the run's config.yaml, changes nothing.
    cfg = prepared("train.max_epochs=200")
    before = copy.deepcopy(cfg)
    assert prepare_config(cfg) == before
    # Iterations on the command line take the place of epochs in the config.
    assert prepare_config(cfg, ["train.max_iter=5"]).train.max_epochs is None
    with pytest.raises(ValueError, match="give one of them"):
        prepared("train.max_epochs=2", "train.max_iter=5")


def test_drops_in_iterations_follow_a_length_in_epochs(tmp_path):
    cfg = make_config(tmp_path, "train.max_iter=100", "train.max_epochs=20", num_images=10)
    cfg.lr_multiplier = multistep_schedule()
    shares = copy.deepcopy(cfg.lr_multiplier)
    cfg.lr_multiplier.scheduler.update(milestones=[60, 90], num_updates="${train.max_iter}")
    prepare_config(cfg)
    assert cfg.train.max_iter == 100  # as it was
    cfg.train.max_epochs = 40
    assert prepare_config(cfg).lr_multiplier.scheduler.milestones == [120, 180]
    cfg.lr_multiplier, cfg.train.max_epochs = shares, 10
    assert prepare_config(cfg).lr_multiplier == shares


def test_no_weights_to_begin_with_are_random_ones(tmp_path):
    cfg = prepare_config(make_config(tmp_path, "train.init_checkpoint=null"))
    assert find_checkpoint(cfg.train.init_checkpoint) == ""  # as the command asks first
    trainer = Trainer(cfg)
    before = {key: x.clone() for key, x in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    assert all(torch.equal(before[key], x) for key, x in trainer.model.state_dict().items())


def test_what_a_person_wants_to_know_is_said_before_the_first_step_and_after_the_last(
    tmp_path, caplog
):
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        train(make_config(tmp_path, "train.eval_period=2"))
    said = [r.getMessage() for r in caplog.records if not getattr(r, "file_only", False)]
    for beginning in (
        "data: annotations",
        "model: StageInteractor with ",
        "weights: random ones",
        "device: cpu (threads: ",
        "effective batch: 2 images",
        "length: 4 iterations; evaluation on annotations",
        f"output: {tmp_path / 'output'}, where log.txt has",
    ):
        assert sum(line.startswith(beginning) for line in said) == 1, beginning
    assert "4 images with 8 objects of 3 classes (cat, dog, bird)" in caplog.text
    done = said[-1]
    assert done.startswith("done: 4 iterations")
    assert "best bbox/AP: " in done and "with the plain weights" in done
    assert re.search("best bbox/AP: .* after [24] iterations, with", done)
    assert str(tmp_path / "output" / "model_best.pth") in done
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        train(make_config(tmp_path / "once"))  # without a best checkpoint
    assert "last evaluation: bbox/AP " in caplog.text and "model_final.pth" in caplog.text


def test_files_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    cfg = make_config(tmp_path / "train")
    for part in ("train", "valid"):
        path, _ = write_dataset(tmp_path / part)
        Path(path).rename(tmp_path / part / "_annotations.coco.json")
    for part, split in (("train", "train"), ("test", "valid")):
        cfg.dataloader[part].dataset.json_file = str(tmp_path / split / "_annotations.coco.json")
        cfg.dataloader[part].dataset.image_root = str(tmp_path / split / "images")
    prepare_config(cfg)
    # The same whether the training set was looked at or not, as in an evaluation.
    assert dataset_names(cfg.dataloader.test.dataset) == ["valid__annotations.coco"]
    assert dataset_names(cfg.dataloader.train.dataset) == ["train__annotations.coco"]
    cfg.dataloader.test.dataset.name = "told_apart"
    assert dataset_names(prepare_config(cfg).dataloader.test.dataset) == ["told_apart"]


def test_with_several_test_sets_the_first_decides_on_the_best(tmp_path):
    cfg = make_config(tmp_path / "a", "train.eval_period=2")
    first = dataset_names(cfg.dataloader.test.dataset)[0]
    second = dataset_names(make_config(tmp_path / "b").dataloader.test.dataset)[0]
    cfg.dataloader.test.dataset.update(json_file=None, image_root=None, names=[first, second])
    trainer = Trainer(prepare_config(cfg))
    (hook,) = [h for h in trainer._hooks if isinstance(h, EvaluationHook)]
    assert hook.best.metric == f"{first}/bbox/AP"


def test_weights_of_other_classes_load_as_far_as_they_fit(tmp_path, caplog):
    train(make_config(tmp_path / "a"))
    weights = tmp_path / "a" / "output" / "model_final.pth"
    document = make_document()
    document["categories"].append({"id": 91, "name": "fish"})
    overrides = [f"train.init_checkpoint='{weights}'", "train.keep_known_classes=false"]
    cfg = make_config(tmp_path / "b", *overrides, document=document)
    trainer = Trainer(prepare_config(cfg))
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        trainer.resume_or_load(resume=False)
    (line,) = [r.getMessage() for r in caplog.records if "as initialised" in r.getMessage()]
    assert "as initialised. Tensors 6 of another shape" in line  # weight and bias of three stages
    assert "decoder.stages.0.class_tower.out.weight (3x16 in the file, 4x16 in the model)" in line
    assert "\n" not in line and len(line) < 500
    loaded = torch.load(weights, weights_only=True)["model"]
    ours = trainer.checkpointer.model.state_dict()
    key = "decoder.stages.1.mixing.filter_generator.weight"
    assert torch.equal(ours[key], loaded[key])


def test_a_resumed_run_says_which_of_two_values_holds(tmp_path, caplog):
    train(make_config(tmp_path, "train.max_iter=2"))
    changed = ["optimizer.lr=1e-3", "optimizer.weight_decay=0.5", "train.max_iter=3"]
    changed += ["dataloader.train.total_batch_size=1", "lr_multiplier.warmup_length=0.5"]
    cfg = make_config(tmp_path, *changed)
    trainer = Trainer(prepare_config(cfg))
    trainer.resume_or_load(resume=True)
    for key, holds in [
        ("optimizer.lr=0.001", "is not used: 0.0007 of the checkpoint holds"),
        ("optimizer.weight_decay=0.5", "is not used: 0.0001 of the checkpoint holds"),
        ("dataloader.train.total_batch_size=1", "holds from here on, it was 2 before"),
        ("train.max_iter=3", "holds from here on, it was 2 before"),
        ("lr_multiplier", "is another one than before: that of the config holds"),
    ]:
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith(key)]
        assert holds in line
    (group,) = trainer.optimizer.param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (7e-4, 1e-4)
    assert trainer.scheduler.base_lrs == [7e-4]
    caplog.clear()
    Trainer(cfg := prepare_config(make_config(tmp_path, "train.max_iter=2"))).resume_or_load()
    assert "holds" not in caplog.text and cfg.optimizer.lr == 7e-4


def test_a_checkpoint_of_other_queries_is_refused_for_resuming(tmp_path):
    train(make_config(tmp_path))
    cfg = prepare_config(make_config(tmp_path, "model.initial_queries.num_queries=7"))
    with pytest.raises(ResumeError, match=r"content.weight \(6x16 in the file, 7x16 in the"):
        Trainer(cfg).resume_or_load(resume=True)


def test_only_a_part_of_the_weights_is_taken_but_a_run_is_resumed_whole(tmp_path):
    train(make_config(tmp_path / "a"))
    weights = tmp_path / "a" / "output" / "model_final.pth"
    prefix = "train.init_prefix=backbone.bottom_up."
    cfg = prepare_config(make_config(tmp_path / "b", f"train.init_checkpoint='{weights}'", prefix))
    torch.manual_seed(7)
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.checkpointer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    loaded = torch.load(weights, weights_only=True)["model"]
    for key, ours in trainer.checkpointer.model.state_dict().items():
        theirs = loaded if key.startswith("backbone.bottom_up.") else before
        assert torch.equal(ours, theirs[key]), key
    trainer.train()
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    trained = trainer.checkpointer.model.state_dict()
    for key, ours in again.checkpointer.model.state_dict().items():
        assert torch.equal(ours, trained[key]), key

    cfg.train.init_prefix = "neck."
    with pytest.raises(ValueError, match="no tensor of the model .* 'neck.': .*train.init_prefix"):
        Trainer(cfg).resume_or_load(resume=False)


def test_missing_and_damaged_weights_are_named(tmp_path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        Checkpointer(model).load(str(tmp_path / "nowhere.pth"))
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"damaged\.pth cannot be read"):
        Checkpointer(model).load(str(damaged))


def test_a_number_of_classes_that_the_data_contradict_is_refused(tmp_path):
    overrides = [*run_overrides(tmp_path), "model.num_classes=5"]
    cfg = apply_overrides(get_config("stageinteractor/shapes_tiny.py"), overrides)
    with pytest.raises(ValueError, match="model.num_classes=5, but .* has 3 classes"):
        prepare_config(cfg, overrides)


def test_the_number_of_classes_follows_the_set_that_has_names(tmp_path):
    cfg = make_config(tmp_path)
    DatasetCatalog.register("nameless", list)
    try:
        cfg.dataloader.train.dataset.update(json_file=None, image_root=None, names="nameless")
        assert prepare_config(cfg).model.num_classes == 3
        cfg.dataloader.test.dataset.update(json_file=None, image_root=None, names="nameless")
        cfg.model.num_classes = 5
        assert prepare_config(cfg).model.num_classes == 5
    finally:
        DatasetCatalog.remove("nameless")
        MetadataCatalog.remove("nameless")


def test_the_number_of_classes_of_detectron2s_two_stage_detectors_follows_too(tmp_path):
    dataset = data_overrides(*write_dataset(tmp_path))
    cfg = apply_overrides(get_config("dfvt/mask_rcnn_dfvt_tiny_1x.py"), dataset)
    heads = prepare_config(cfg).model.roi_heads
    assert (heads.num_classes, heads.box_predictor.num_classes) == (3, 3)
    assert heads.mask_head.num_classes == 3
    overrides = ["model.roi_heads.num_classes=4"]
    with pytest.raises(ValueError, match=r"model\.roi_heads\.num_classes=4, but .* has 3 classes"):
        prepare_config(apply_overrides(cfg, overrides), overrides)


def test_test_classes_other_than_the_training_ones_are_refused(tmp_path):
    document = make_document()
    document["categories"][1]["name"] = "wolf"
    cfg = make_config(tmp_path / "train")
    other = make_config(tmp_path / "test", document=document)
    cfg.dataloader.test.dataset = other.dataloader.test.dataset
    with pytest.raises(ValueError, match="'dog'.*'wolf'"):
        prepare_config(cfg)


def test_test_sets_that_differ_among_themselves_are_refused(tmp_path):
    document = make_document()
    document["categories"][1]["name"] = "wolf"
    cfg = make_config(tmp_path / "a")
    other = make_config(tmp_path / "b", document=document)
    names = [dataset_names(c.dataloader.test.dataset)[0] for c in (cfg, other)]
    cfg.dataloader.test.dataset.update(json_file=None, image_root=None, names=names)
    with pytest.raises(ValueError, match="'dog'.*'wolf'"):
        prepare_config(cfg, training=False)


def test_more_objects_than_queries_is_worth_a_warning_and_trains(tmp_path, caplog):
    cfg = make_config(tmp_path, num_images=2, boxes_per_image=5)
    cfg.model.initial_queries.num_queries = 4
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        train(cfg)
    assert "2 of 2 training images have more objects (up to 5)" in caplog.text


def multistep_schedule():
    return get_config("stageinteractor/stageinteractor_r50_100q_1x.py").lr_multiplier


def test_drops_as_a_share_of_the_run_are_left_as_they_are(tmp_path):
    cfg = make_config(tmp_path, "train.reference_world_size=2")
    cfg.lr_multiplier = multistep_schedule()
    scaled = Trainer.auto_scale_workers(cfg, 4)
    assert scaled.lr_multiplier == cfg.lr_multiplier


def test_scaling_to_another_number_of_processes(tmp_path):
    cfg = make_config(
        tmp_path,
        "train.reference_world_size=2",
        "dataloader.train.total_batch_size=8",
        "optimizer.lr=1e-3",
        "train.max_iter=100",
        "train.eval_period=10",
    )
    scaled = Trainer.auto_scale_workers(cfg, 4)
    assert scaled.dataloader.train.total_batch_size == 16
    assert scaled.optimizer.lr == pytest.approx(2e-3)
    assert (scaled.train.max_iter, scaled.train.eval_period) == (50, 5)
    assert cfg.train.max_iter == 100
    assert Trainer.auto_scale_workers(cfg, 2) is cfg
    # Drops that are counted in iterations of the run are scaled with it; a period never to zero.
    cfg.lr_multiplier = multistep_schedule()
    cfg.lr_multiplier.scheduler.update(milestones=[60, 90], num_updates="${train.max_iter}")
    cfg.train.eval_period = 1
    scaled = Trainer.auto_scale_workers(cfg, 4)
    assert scaled.lr_multiplier.scheduler.milestones == [30, 45]
    assert scaled.train.eval_period == 1
    cfg.dataloader.train.total_batch_size = 7
    with pytest.raises(ValueError, match="reference_world_size=2 does not divide"):
        Trainer.auto_scale_workers(cfg, 4)


def test_the_effective_batch_and_rate_are_logged(tmp_path, caplog):
    cfg = make_config(tmp_path, "train.accumulation_steps=3", "optimizer.lr=1e-3")
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        Trainer(prepare_config(cfg))
    assert "effective batch: 6 images = 2 per step over 1 process x 3 accumulated" in caplog.text
    assert "learning rate 0.001" in caplog.text


def test_decay_reaches_norms_and_biases(tmp_path):
    cfg = make_config(tmp_path)
    model = Trainer.build_model(cfg)
    (group,) = Trainer.build_optimizer(cfg, model).param_groups
    assert group["weight_decay"] == 1e-4
    assert len(group["params"]) == len([p for p in model.parameters() if p.requires_grad])


def test_a_test_set_without_annotations_yields_a_submission(tmp_path, caplog):
    document = make_document(num_images=2)
    cfg = make_config(tmp_path, document=document)
    del document["annotations"]
    test = make_config(tmp_path / "test", document=document)
    cfg.dataloader.test = test.dataloader.test
    prepare_config(cfg)
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        results = Trainer.test(cfg, Trainer.build_model(cfg))
    assert results == {}
    (path,) = (tmp_path / "output").glob("inference/*/coco_instances_results.json")
    detections = json.loads(path.read_text())
    assert {d["image_id"] for d in detections} == {1, 2}
    assert {d["category_id"] for d in detections} <= {3, 7, 90}
    assert str(path) in caplog.text


def test_a_test_image_that_is_missing_is_named_before_training(tmp_path):
    cfg = make_config(tmp_path / "train")
    other = make_config(tmp_path / "test")
    cfg.dataloader.test.dataset = other.dataloader.test.dataset
    (tmp_path / "test" / "data" / "images" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 images of dataloader\.test .*3\.png"):
        Trainer(prepare_config(cfg))


@pytest.mark.parametrize("amp_in_training", [True, False])
def test_evaluation_in_bfloat16_is_a_choice_of_its_own(tmp_path, amp_in_training):
    def detections_and_type(evaluation):
        apply_overrides(cfg, [f"train.amp.evaluation={evaluation}"])
        seen = []
        handle = model.decoder.register_forward_hook(lambda m, i, out: seen.append(out[-1]))
        results = Trainer.test(cfg, model)
        handle.remove()
        return results["bbox"], seen[0].logits.dtype, seen[0].boxes.dtype

    cfg = prepare_config(
        make_config(
            tmp_path, f"train.amp.enabled={amp_in_training}", "train.amp.precision=bfloat16"
        )
    )
    model = Trainer.build_model(cfg)
    assert detections_and_type(False)[1:] == (torch.float32, torch.float32)
    assert detections_and_type(True)[1:] == (torch.bfloat16, torch.float32)
    assert not torch.is_autocast_enabled("cpu")


def test_evaluation_in_float16_needs_a_gpu(tmp_path):
    cfg = prepare_config(make_config(tmp_path, "train.amp.evaluation=true"))
    with pytest.raises(ValueError, match="needs a GPU; use train.amp.precision=bfloat16 on cpu"):
        Trainer.test(cfg, Trainer.build_model(cfg))
