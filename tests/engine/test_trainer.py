import json
import logging

import pytest
import torch
from coco_files import make_document
from small_runs import make_config, run_overrides

from stageinteractor.checkpoint.checkpointer import Checkpointer, ResumeError, inference_weights
from stageinteractor.config import apply_overrides, get_config
from stageinteractor.engine import Trainer, prepare_config


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


def test_a_resumed_run_goes_on_with_iteration_optimiser_rate_and_average(tmp_path):
    options = ["train.ema.enabled=true", "train.ema.decay=0.5"]
    first = train(make_config(tmp_path, "train.max_iter=2", *options))
    cfg = prepare_config(make_config(tmp_path, "train.max_iter=4", *options))
    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    for name, value in first.checkpointer.model.state_dict().items():
        assert torch.equal(second.checkpointer.model.state_dict()[name], value), name
    for name, value in first.ema.state_dict().items():
        assert torch.equal(second.ema.state_dict()[name], value), name
    before, after = (t.optimizer.state_dict()["state"] for t in (first, second))
    assert all(torch.equal(after[k]["exp_avg"], before[k]["exp_avg"]) for k in before)
    second.train()
    assert second.iter == 4
    assert second.scheduler.last_epoch == 4


def test_the_average_is_stored_and_evaluated(tmp_path, caplog):
    cfg = make_config(tmp_path, "train.ema.enabled=true", "train.eval_period=4")
    with caplog.at_level(logging.INFO, logger="stageinteractor"):
        train(cfg)
    assert "evaluating the averaged (EMA) weights" in caplog.text
    checkpoint = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    averaged = inference_weights(checkpoint)
    assert averaged.keys() == checkpoint["model"].keys()
    assert not torch.equal(
        averaged["decoder.stages.0.box_tower.out.weight"],
        checkpoint["model"]["decoder.stages.0.box_tower.out.weight"],
    )
    assert inference_weights(checkpoint, prefer_ema=False) is checkpoint["model"]


def test_a_decay_outside_of_zero_and_one_is_refused(tmp_path):
    cfg = make_config(tmp_path, "train.ema.enabled=true", "train.ema.decay=1.5")
    with pytest.raises(ValueError, match="train.ema.decay"):
        Trainer(prepare_config(cfg))


def test_the_best_checkpoint_survives_a_resume(tmp_path):
    cfg = make_config(tmp_path, "train.eval_period=2", "train.max_iter=2")
    first = train(cfg)
    best = [h for h in first._hooks if type(h).__name__ == "BestCheckpointer"][0].best_metric
    second = Trainer(prepare_config(make_config(tmp_path, "train.eval_period=2")))
    second.resume_or_load(resume=True)
    hook = [h for h in second._hooks if type(h).__name__ == "BestCheckpointer"][0]
    assert hook.best_metric is None or hook.best_metric == best


def test_weights_of_other_classes_load_as_far_as_they_fit(tmp_path, caplog):
    train(make_config(tmp_path / "a"))
    weights = tmp_path / "a" / "output" / "model_final.pth"
    document = make_document()
    document["categories"].append({"id": 91, "name": "fish"})
    cfg = make_config(tmp_path / "b", f"train.init_checkpoint='{weights}'", document=document)
    trainer = Trainer(prepare_config(cfg))
    with caplog.at_level(logging.WARNING, logger="stageinteractor"):
        trainer.resume_or_load(resume=False)
    (table,) = [r.getMessage() for r in caplog.records if "do not fit" in r.getMessage()]
    assert table.startswith("6 tensors of the checkpoint")  # weight and bias of three stages
    assert "decoder.stages.2.class_tower.out.weight" in table
    assert "3x16" in table and "4x16" in table
    loaded = torch.load(weights, weights_only=True)["model"]
    ours = trainer.checkpointer.model.state_dict()
    key = "decoder.stages.1.mixing.filter_generator.weight"
    assert torch.equal(ours[key], loaded[key])


def test_a_checkpoint_of_other_queries_is_refused_for_resuming(tmp_path):
    train(make_config(tmp_path))
    cfg = prepare_config(make_config(tmp_path, "model.initial_queries.num_queries=7"))
    with pytest.raises(ResumeError, match="initial_queries.content.weight *6x16 *7x16"):
        Trainer(cfg).resume_or_load(resume=True)


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


def test_test_classes_other_than_the_training_ones_are_refused(tmp_path):
    document = make_document()
    document["categories"][1]["name"] = "wolf"
    cfg = make_config(tmp_path / "train")
    other = make_config(tmp_path / "test", document=document)
    cfg.dataloader.test.dataset = other.dataloader.test.dataset
    with pytest.raises(ValueError, match="'dog'.*'wolf'"):
        prepare_config(cfg)


def test_more_objects_than_queries_is_worth_a_warning_and_trains(tmp_path, caplog):
    cfg = make_config(tmp_path, num_images=2, boxes_per_image=5)
    cfg.model.initial_queries.num_queries = 4
    with caplog.at_level(logging.WARNING, logger="stageinteractor"):
        train(cfg)
    assert "2 of 2 training images have more objects (up to 5)" in caplog.text


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
    cfg.dataloader.train.total_batch_size = 7
    with pytest.raises(ValueError, match="reference_world_size=2 does not divide"):
        Trainer.auto_scale_workers(cfg, 4)


def test_the_effective_batch_and_rate_are_logged(tmp_path, caplog):
    cfg = make_config(tmp_path, "train.accumulation_steps=3", "optimizer.lr=1e-3")
    with caplog.at_level(logging.INFO, logger="stageinteractor"):
        Trainer(prepare_config(cfg))
    assert "effective batch: 6 images = 2 a step over 1 processes x 3 accumulated" in caplog.text
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
    with caplog.at_level(logging.INFO, logger="stageinteractor"):
        results = Trainer.test(cfg, Trainer.build_model(cfg))
    assert results == {}
    (path,) = (tmp_path / "output").glob("inference/*/coco_instances_results.json")
    detections = json.loads(path.read_text())
    assert {d["image_id"] for d in detections} == {1, 2}
    assert {d["category_id"] for d in detections} <= {3, 7, 90}
    assert str(path) in caplog.text
