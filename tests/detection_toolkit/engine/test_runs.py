"""The folder of a run is all that using its detector takes."""

import json
import logging
import shutil

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data.transforms import ResizeShortestEdge
from small_runs import draw_blocks, make_config

from detection_toolkit.engine import Predictor, Trainer, prepare_config
from detection_toolkit.engine.predictor import predictor_config
from detection_toolkit.engine.runs import claim_folder, find_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a run whose data are gone."""
    folder = tmp_path_factory.mktemp("run")
    cfg = make_config(folder, "train.eval_period=2")
    resize = L(ResizeShortestEdge)(short_edge_length=60, max_size=100)
    cfg.dataloader.test.mapper.augmentations = [resize]
    prepare_config(cfg)
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    shutil.rmtree(folder / "data")
    output = folder / "output"
    shutil.move(folder / "config.yaml", output / "config.yaml")
    return output


@pytest.mark.parametrize("named", ["", "config.yaml", "model_best.pth", "model_final.pth"])
def test_the_folder_or_a_checkpoint_in_it_is_enough(trained, caplog, named):
    with caplog.at_level(logging.INFO, logger="detection_toolkit"):
        predictor = Predictor.from_run(str(trained / named))
    taken = [line for line in caplog.messages if line.startswith("config of ")]
    line = f"config of {trained / named}: {trained / 'config.yaml'}"
    assert taken == ([] if named == "config.yaml" else [line])
    assert "no class names" not in caplog.text
    assert predictor.metadata.thing_classes == ["cat", "dog", "bird"]
    used = named if named.endswith(".pth") else "model_best.pth"
    weights = torch.load(trained / used, weights_only=True)["model"]
    for key, value in predictor.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert len(predictor(draw_blocks())["instances"])


def test_every_command_takes_the_folder(trained):
    cfg = predictor_config(str(trained), ["train.device=cpu"])
    assert cfg.train.init_checkpoint == str(trained / "model_best.pth")
    other = str(trained / "model_final.pth")
    for named in (str(trained), str(trained / "config.yaml")):
        cfg = predictor_config(named, [f"train.init_checkpoint='{other}'"])
        assert cfg.train.init_checkpoint == other
        assert predictor_config(named, weights=other).train.init_checkpoint == other


def test_checkpoints_tell_of_their_run_and_a_difference_is_said(trained, caplog):
    facts = torch.load(trained / "model_best.pth", weights_only=True)["run"]
    assert facts["classes"] == ["cat", "dog", "bird"]
    assert facts["input_format"] == "RGB"
    assert facts["resizing"][0]["_target_"].endswith("ResizeShortestEdge")
    assert json.loads(json.dumps(facts)) == facts
    short = "dataloader.test.mapper.augmentations.0.short_edge_length=99"
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        Predictor.from_run(str(trained))
        assert "the checkpoint's run had" not in caplog.text
        Predictor.from_run(str(trained), [short, "dataloader.test.mapper.image_format=BGR"])
    assert "had dataloader.test.mapper.image_format=RGB, and not BGR" in caplog.text
    assert "had dataloader.test.mapper.augmentations=" in caplog.text


def test_a_run_on_a_gpu_is_used_without_one(trained, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target = trained.parent / "gpu"
    shutil.copytree(trained, target)
    text = (target / "config.yaml").read_text()
    assert "device: cpu" in text
    (target / "config.yaml").write_text(text.replace("device: cpu", "device: cuda"))
    assert Predictor.from_run(str(target)).cfg.train.device == "cpu"
    assert "there is no GPU here" in caplog.text


def test_without_a_best_checkpoint_the_last_one_is_used(trained, tmp_path):
    for name in ("config.yaml", "last_checkpoint", "model_final.pth"):
        shutil.copy(trained / name, tmp_path / name)
    assert find_run(str(tmp_path)) == (
        str(tmp_path / "config.yaml"),
        str(tmp_path / "model_final.pth"),
    )


def test_what_is_no_run_is_said(tmp_path):
    assert find_run("stageinteractor/shapes_tiny.py") is None
    with pytest.raises(FileNotFoundError, match="there is no config.yaml in"):
        find_run(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        find_run(str(tmp_path / "nowhere.pth"))
    (tmp_path / "config.yaml").write_text("train: {}")
    assert find_run(str(tmp_path)) == (str(tmp_path / "config.yaml"), None)
    with pytest.raises(FileNotFoundError, match="is no folder with a checkpoint"):
        Predictor.from_run(str(tmp_path))


def test_a_folder_is_free_until_a_run_has_left_a_checkpoint(tmp_path):
    folder = tmp_path / "output"
    claim_folder(str(folder))
    (folder / "inference").mkdir(parents=True)
    (folder / "log.txt").write_text("an evaluation")
    claim_folder(str(folder))
    (folder / "model_0000009.pth").write_bytes(b"")
    for number in (1, 2):
        with pytest.raises(ValueError, match="--move-aside"):
            claim_folder(str(folder))
        claim_folder(str(folder), move_aside=True)
        assert (tmp_path / f"output.{number}" / "model_0000009.pth").is_file()
        assert not folder.exists()
        folder.mkdir()
        (folder / "model_0000009.pth").write_bytes(b"")
