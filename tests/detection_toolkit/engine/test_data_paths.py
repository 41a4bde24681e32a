"""Runs on data sets of other tools, by --data."""

import json
import logging
import os
import re

import pytest
from coco_files import make_document
from format_files import make_splits, write_coco, write_roboflow_coco, write_yolo
from omegaconf import OmegaConf
from small_runs import SMALL_MODEL

from detection_toolkit.commands import report, train
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.data import get_detection_dataset
from detection_toolkit.engine import prepare_config
from detection_toolkit.engine.arguments import parse_arguments
from detection_toolkit.errors import UserError

CONFIG = "stageinteractor/shapes_tiny.py"
SETTINGS = [
    *SMALL_MODEL,
    "train.device=cpu",
    "train.max_iter=3",
    "train.eval_period=0",
    "train.log_period=1",
    "train.seed=1",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
]


@pytest.fixture(autouse=True)
def loggers():
    """Those of a run, given back."""
    train._load_once.cache_clear()
    names = ("detectron2", "fvcore", "detection_toolkit")
    before = [(logging.getLogger(n), list(logging.getLogger(n).handlers)) for n in names]
    propagates = [logger.propagate for logger, _ in before]
    yield
    for (logger, handlers), propagate in zip(before, propagates):
        logger.handlers, logger.propagate = handlers, propagate


def run(*arguments, evaluation=False):
    train.main([*arguments], evaluation=evaluation)


def metrics(folder):
    """All losses and other numbers of each step, but times."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    steps = [line for line in lines if "total_loss" in line]
    return [
        {k: v for k, v in step.items() if "time" not in k and "memory" not in k} for step in steps
    ]


def configure(*arguments):
    args = parse_arguments(train.get_parser(), ["--config-file", CONFIG, *arguments])
    return apply_overrides(get_config(CONFIG), args.opts), args.opts


def test_data_sets_training_and_test_images_by_full_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yolo(tmp_path / "pets", make_splits())
    cfg, opts = configure("--data", "pets/data.yaml", "train.seed=3")
    path = str(tmp_path / "pets" / "data.yaml")
    assert (cfg.dataloader.train.dataset.path, cfg.dataloader.train.dataset.split) == (
        path,
        "train",
    )
    assert (cfg.dataloader.test.dataset.path, cfg.dataloader.test.dataset.split) == (path, "val")
    assert prepare_config(cfg, opts).model.num_classes == 3


def test_paths_may_have_any_letters_and_what_is_named_in_full_wins(tmp_path):
    folder = write_yolo(tmp_path / "it's, [é]=1", make_splits())
    cfg, _ = configure("--data", str(folder), "dataloader.test.dataset.split=train")
    assert cfg.dataloader.test.dataset.path == str(folder)
    assert cfg.dataloader.test.dataset.split == "train"


def test_images_elsewhere_and_the_format_go_with_data(tmp_path, capsys):
    cfg, _ = configure("--data", "a.csv", "--image-root", str(tmp_path), "--format", "coco")
    for part in ("train", "test"):
        assert cfg.dataloader[part].dataset.image_root == str(tmp_path)
        assert cfg.dataloader[part].dataset.format == "coco"
    for option in ("--image-root", "--format"):
        with pytest.raises(SystemExit):
            configure(option, "x")
        assert "go with --data" in capsys.readouterr().err


def test_other_data_than_those_of_a_run_have_none_of_their_settings(tmp_path):
    from detection_toolkit.config import config_text

    write_yolo(tmp_path / "pets", make_splits())
    write_coco(tmp_path / "others", make_splits())
    names = [f"dataloader.{part}.dataset.name={part}_pets" for part in ("train", "test")]
    options = ("--image-root", str(tmp_path / "pets"), "--format", "yolo", *names)
    cfg, _ = configure("--data", str(tmp_path / "pets"), *options)
    path = tmp_path / "config.yaml"
    path.write_text(config_text(cfg))
    words = ["--config-file", str(path), "--data", str(tmp_path / "others")]
    args = parse_arguments(train.get_parser(), words)
    cfg = apply_overrides(get_config(str(path)), args.opts)
    for part in ("train", "test"):
        node = cfg.dataloader[part].dataset
        assert (node.image_root, node.name, node.format) == (None, None, None)
        assert node.path == str(tmp_path / "others")
    assert prepare_config(cfg).model.num_classes == 3


@pytest.mark.parametrize(
    ("data", "override", "split"),
    [
        ("others", [], None),
        ("others/data.yaml", [], None),
        ("others", ["dataloader.test.dataset.split=train"], "train"),
        ("own", [], "val"),
        ("own/data.yaml", [], "val"),
        ("divided", [], "val"),
    ],
)
def test_all_images_of_other_data_are_evaluated(tmp_path, data, override, split):
    from detection_toolkit.config import config_text

    for name in ("own", "others"):
        write_yolo(tmp_path / name, {"train": make_document(num_images=10)})
    write_yolo(tmp_path / "divided", make_splits())
    cfg, _ = configure("--data", str(tmp_path / "own"))
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    path.write_text(config_text(cfg))
    words = ["--config-file", str(path), "--data", str(tmp_path / data), *override]
    found = []
    for evaluation in (True, False):
        args = parse_arguments(train.get_parser(evaluation=evaluation), words)
        found.append(train.load_config(args).dataloader.test.dataset.split)
    assert found == [split, "train" if override else "val"]  # training holds some out
    if data.startswith("others") and not override:
        cfg = train.load_config(parse_arguments(train.get_parser(evaluation=True), words))
        node = {k: v for k, v in cfg.dataloader.test.dataset.items() if k != "_target_"}
        assert len(get_detection_dataset(**node)) == 10


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("divided", [True, False])
def test_images_of_unknown_size_are_skipped_on_request(tmp_path, is_there, divided, caplog):
    """Those of YOLO, whose labels are shares of it."""
    splits = make_splits() if divided else {"train": make_document(num_images=6)}
    folder = write_yolo(tmp_path / "pets", splits)
    images = sorted((folder / "images/train").iterdir())
    lines = "".join(f"images/train/{image.name}\n" for image in images)
    (folder / "list.txt").write_text(lines)
    text = (folder / "data.yaml").read_text()
    (folder / "data.yaml").write_text(text.replace("train: images/train", "train: list.txt"))
    images[0].write_bytes(b"no picture")
    if not is_there:
        images[0].unlink()
    what = "cannot be read" if is_there else "does not exist"
    cfg, _ = configure("--data", str(folder))
    with pytest.raises(UserError, match=what):
        prepare_config(cfg)
    cfg, _ = configure("--data", str(folder), "dataloader.train.skip_unreadable=true")
    assert prepare_config(cfg).model.num_classes == 3
    counts = []
    for part in ("train", "test"):
        node = {k: v for k, v in cfg.dataloader[part].dataset.items() if k != "_target_"}
        counts.append(len(get_detection_dataset(**node)))
    assert counts == ([3, 2] if divided else [4, 1])
    assert re.search(f"1 images are left out, as skip_unreadable=true, .*{what}", caplog.text)


def test_the_share_that_is_held_out_is_one_for_both(tmp_path):
    write_coco(tmp_path / "pets", {"train": make_document(num_images=10)})
    data = ("--data", str(tmp_path / "pets"))
    cfg, _ = configure(*data, "dataloader.train.dataset.val_share=0.5")
    assert cfg.dataloader.test.dataset.val_share == 0.5
    prepare_config(cfg)
    cfg, _ = configure(*data, "dataloader.test.dataset.split_seed=1")
    with pytest.raises(
        UserError, match=r"train\.dataset\.split_seed=0, and .*split_seed=1: set bo"
    ):
        prepare_config(cfg)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "data set .*nowhere does not exist"),
        (["--data", "."], "the folder is empty"),
        (["--data", ".", "--format", "yollo"], "no format yollo: did you mean yolo"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SystemExit) as ended:
        output = f"train.output_dir='{tmp_path / 'output'}'"
        run("--config-file", CONFIG, *arguments, *SETTINGS, output)
    assert re.search(message, str(ended.value)) and "\n" not in str(ended.value)


def test_json_file_and_path_exclude_each_other(tmp_path):
    cfg, _ = configure("--data", str(tmp_path), "dataloader.test.dataset.json_file=a.json")
    with pytest.raises(UserError, match=r"json_file=a\.json and path=.* are both given"):
        prepare_config(cfg)


@pytest.mark.slow
def test_a_run_on_each_format_has_the_same_losses_and_is_used_from_any_folder(
    tmp_path, monkeypatch, capsys
):
    splits = make_splits()
    folders = {
        "coco": write_coco(tmp_path / "coco", splits),
        "yolo": write_yolo(tmp_path / "yolo", splits),
        "roboflow": write_roboflow_coco(tmp_path / "roboflow", splits),
    }
    monkeypatch.chdir(tmp_path)
    found = {}
    for name in folders:
        output = f"train.output_dir={name}_run"
        run("--config-file", CONFIG, "--data", name, *SETTINGS, output)
        found[name] = metrics(tmp_path / f"{name}_run")
    assert len(found["coco"]) == 3 and len(found["coco"][0]) > 10
    assert found["yolo"] == found["coco"] == found["roboflow"]  # to the last digit

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.rename(tmp_path / "yolo_run", elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    run("--config-file", "moved/config.yaml", evaluation=True)
    (numbers,) = (elsewhere / "moved").glob("inference/*/metrics.json")
    assert numbers.parent.name == "yolo_val"
    output = "train.output_dir=moved"
    run("--config-file", "moved/config.yaml", "--resume", "train.max_iter=4", output)
    assert len(metrics(elsewhere / "moved")) == 4
    report.main(["moved", "--images", "1"])
    assert (elsewhere / "moved" / "report.html").is_file()


def test_the_config_of_a_run_is_used_without_being_trusted(tmp_path):
    """What --data records is text and numbers, and what a file allows itself is taken back."""
    from detection_toolkit.config import config_text

    folder = write_yolo(tmp_path / "pets", make_splits())
    cfg, _ = configure("--data", str(folder), "dataloader.train.dataset.allow_outside=true")
    path = tmp_path / "config.yaml"
    path.write_text(config_text(cfg))
    again = get_config(str(path))
    assert again.dataloader.train.dataset.path == str(folder)
    assert again.dataloader.test.dataset.val_share == 0.2
    assert again.dataloader.train.dataset.allow_outside is False
    assert prepare_config(again).model.num_classes == 3


@pytest.mark.parametrize(
    "target",
    [
        "detection_toolkit.data.formats.yolo.YoloSource",
        "detection_toolkit.data.formats.open_source",
        "detection_toolkit.data.registration.register_data",
    ],
)
def test_a_strangers_config_calls_no_reader_by_itself(tmp_path, target):
    path = tmp_path / "config.yaml"
    OmegaConf.save({"a": {"_target_": target, "path": "/"}}, path)
    with pytest.raises(UserError, match="which is no part of a detector"):
        get_config(str(path))
