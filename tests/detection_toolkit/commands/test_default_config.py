"""What ``train`` and ``eval`` take where no config is named."""

import os
from pathlib import Path

import pytest
import yaml
from coco_files import write_dataset
from format_files import make_splits, write_yolo
from omegaconf import OmegaConf
from small_runs import make_config

from detection_toolkit.checkpoint import hub
from detection_toolkit.commands import default_config, evaluate, train
from detection_toolkit.config import config_text, get_config
from detection_toolkit.engine.shipped import (
    config_for_own_data,
    shipped_checkpoint,
    shipped_config,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, with data."""
    write_yolo(tmp_path / "pets", make_splits())
    monkeypatch.chdir(tmp_path)
    train._load_once.cache_clear()
    return tmp_path


@pytest.fixture
def printed(capsys):
    """The config of a command line, and the line that says what was chosen."""

    def call(*words, command=train):
        with pytest.raises(SystemExit) as ended:
            command.main([*words, "--print-config"])
        shown = capsys.readouterr()
        if ended.value.code:
            return str(ended.value.code), shown.err
        return OmegaConf.create(yaml.unsafe_load(shown.out), flags={"allow_objects": True}), (
            shown.err
        )

    return call


def make_run(path, output_dir="elsewhere"):
    """Config and best checkpoint, as a run leaves them."""
    path.mkdir(parents=True)
    cfg = make_config(path.parent / "made", f"train.output_dir={output_dir}")
    (path / "config.yaml").write_text(config_text(cfg))
    for name in ("model_best.pth", "model_final.pth"):
        (path / name).touch()
    (path / "last_checkpoint").write_text("model_final.pth")
    return path


def test_data_alone_are_trained_on_by_the_config_for_them_from_the_shipped_weights(folder, printed):
    cfg, line = printed("--data", "pets")
    packaged = get_config(config_for_own_data())
    assert cfg.model == OmegaConf.create(yaml.unsafe_load(config_text(packaged))).model
    assert cfg.dataloader.train.dataset.path == str(folder / "pets")
    assert cfg.train.init_checkpoint == shipped_checkpoint() and os.path.isfile(
        cfg.train.init_checkpoint
    )
    assert cfg.train.output_dir == "output/pets"
    assert line.startswith(f"config: {config_for_own_data()}, ") and line.count("\n") == 1
    for words in ("--config-file NAME", "--list-configs", "--weights FILE", "output/pets"):
        assert words in line


def test_what_is_named_is_taken(folder, printed):
    words = ("--data", "pets", "train.output_dir=mine", "train.init_checkpoint=''")
    cfg, line = printed(*words, "train.max_epochs=3")
    assert (cfg.train.output_dir, cfg.train.init_checkpoint, cfg.train.max_epochs) == (
        "mine",
        "",
        3,
    )
    assert "output: mine" in line and "weights: none" in line


def test_data_may_be_named_by_keys(folder, printed):
    json_file, images = write_dataset(folder / "bolts")
    key = "dataloader.train.dataset"
    cfg, _ = printed(f"{key}.json_file='{json_file}'", f"{key}.image_root='{images}'")
    assert cfg.train.output_dir.startswith("output/")


def test_a_config_that_is_named_is_all_there_is(folder, printed):
    cfg, line = printed("--config-file", shipped_config(), "--data", "pets")
    assert not line and cfg.train.output_dir == get_config(shipped_config()).train.output_dir
    assert not cfg.train.init_checkpoint


def test_an_output_folder_is_a_new_one(folder, printed):
    make_run(folder / "output" / "pets")
    (folder / "output" / "pets_2").mkdir()
    (folder / "output" / "pets_2" / "log.txt").touch()  # of an evaluation, or has just begun
    assert printed("--data", "pets")[0].train.output_dir == "output/pets_3"
    assert printed("--data", "pets", "--move-aside")[0].train.output_dir == "output/pets"


def test_nothing_named_is_not_the_same_as_null(folder, printed):
    cfg, line = printed("--data", "pets", "train.init_checkpoint=null")
    assert cfg.train.init_checkpoint is None and "weights: none" in line
    cfg, _ = printed("--data", "pets", "train.seed=3", "train.output_dir=runs/of_${train.seed}")
    assert cfg.train.output_dir == "runs/of_3"


@pytest.mark.parametrize(
    "data, name",
    [
        ("my pets/data.yaml", "my_pets"),
        ("pets/annotations/instances_train2017.json", "pets"),
        ("cells.json", "cells"),
        ("...yaml", "own_data"),
    ],
)
def test_a_folder_is_called_like_its_data(data, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "own_data":
        monkeypatch.chdir("/")
    assert default_config._name(data) == name


def test_several_machines_agree_on_a_folder(folder, printed):
    code, _ = printed("--data", "pets", "--num-machines", "2")
    assert code == ("error: several processes need one folder: name it as train.output_dir=FOLDER")


@pytest.mark.parametrize("words", [[], ["train.seed=3"], ["--weights", "a.pth"]])
def test_without_config_and_data_an_error_names_both_ways_and_some_configs(words, printed):
    code, _ = printed(*words)
    assert code.startswith("error: nothing to train on: ") and "\n" not in code
    for named in ("--data my/data.yaml", f"--config-file {shipped_config()}", "--list-configs"):
        assert named in code
    assert code.count("_custom.py") > 2


def test_a_run_is_resumed_by_its_own_config(folder, printed):
    run = make_run(folder / "a run")
    cfg, line = printed("--resume", f"train.output_dir='{run}'", "train.log_period=7")
    assert cfg.train.output_dir == str(run) and cfg.train.log_period == 7
    assert cfg.model.num_classes == get_config(str(run / "config.yaml")).model.num_classes
    assert line == f"config: {run}/config.yaml, that of the run\n"
    code, _ = printed("--resume", "train.output_dir=none")
    assert code == "error: there is no run in none: it has no config.yaml"
    code, _ = printed("--resume")
    assert code == "error: --resume needs the run: its folder as train.output_dir=RUN"
    # What a job that is started again and again says: it begins, where there is nothing yet.
    cfg, line = printed("--resume", "--data", "pets", "train.output_dir=none")
    assert cfg.train.output_dir == "none" and line.startswith(f"config: {config_for_own_data()}")


@pytest.mark.parametrize("named", ["--weights", "train.output_dir"])
def test_a_run_is_evaluated_by_its_own_config(folder, printed, named):
    make_run(folder / "run")
    words = ("--weights", "run") if named == "--weights" else (f"{named}=run",)
    cfg, _ = printed(*words, command=evaluate)
    assert cfg.train.init_checkpoint == "run/model_best.pth" and cfg.train.output_dir == "run"


def test_an_evaluation_of_nothing_says_what_can_be_named(printed):
    code, _ = printed(command=evaluate)
    assert code.startswith("error: name what to evaluate: a run by --weights RUN or train.output")
    assert shipped_config() in code and "\n" not in code


@pytest.mark.parametrize("weights", ["run", "run/model_best.pth"])
def test_weights_of_a_run_are_trained_on_by_its_config(folder, printed, weights):
    make_run(folder / "run")
    cfg, line = printed("--data", "pets", "--weights", weights)
    assert cfg.model.decoder.num_stages == 3  # not the packaged one's
    assert cfg.train.init_checkpoint == "run/model_best.pth"
    assert cfg.train.output_dir == "output/pets"
    assert line.startswith(f"config: run/config.yaml, that of {weights} ")


def test_weights_of_the_hub_are_trained_on_by_the_config_there(folder, printed, monkeypatch):
    run = make_run(folder / "cached")
    files = (str(run / "config.yaml"), str(run / "model_best.pth"))
    for module in (hub, __import__("detection_toolkit.engine.runs", fromlist=["runs"])):
        monkeypatch.setattr(module, "local_model", lambda address: files)
    cfg, line = printed("--data", "pets", "--weights", "hf://me/pets")
    assert cfg.model.decoder.num_stages == 3 and cfg.train.output_dir == "output/pets"
    assert cfg.train.init_checkpoint == "hf://me/pets" and "config: hf://me/pets" in line


@pytest.mark.parametrize("command", [train, evaluate])
@pytest.mark.parametrize(
    "weights, said",
    [
        ("nosuch.pth", "checkpoint nosuch.pth does not exist: name a file"),
        ("pets/labls", "checkpoint pets/labls does not exist: did you mean pets/labels\\?"),
        ("pets", "the folder pets has neither model.safetensors nor pytorch_model.bin"),
        ("hf://pets", "hf://pets names no model of the hub: these are hf://OWNER/NAME"),
    ],
)
def test_weights_are_looked_at_before_data_and_folder(folder, weights, said, command, monkeypatch):
    monkeypatch.setattr(train, "run", lambda args: pytest.fail("begun"))
    words = ["--config-file", config_for_own_data(), "--data", "nosuch", "--weights", weights]
    with pytest.raises(SystemExit, match=f"^error: {said}"):
        command.main([*words, "train.output_dir=out", "train.device=cpu"])
    assert not Path("out").exists()


def test_a_run_that_goes_on_needs_the_weights_no_more_that_it_began_with(folder, monkeypatch):
    begun = []
    monkeypatch.setattr("detection_toolkit.engine.launch", lambda *a, **k: begun.append(a))
    make_run(folder / "run")
    words = ["--resume", "train.output_dir=run", "--weights", "gone.pth", "train.device=cpu"]
    train.main(words)
    assert begun
    with pytest.raises(SystemExit, match="gone.pth does not exist"):
        train.main([*words, "--move-aside", "train.output_dir=other", "--data", "pets"])
