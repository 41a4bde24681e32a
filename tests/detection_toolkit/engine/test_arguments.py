"""Overrides, weights and thresholds have one spelling, whichever command they are given to."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

from detection_toolkit.commands import predict, train, view_stages
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine.arguments import add_config_arguments, parse_arguments
from detection_toolkit.visualization import DEFAULT_SCORE_THRESHOLD

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "projects" / "detection_toolkit"
COMMANDS = [*(PACKAGE / "commands").glob("[a-z]*.py"), *(ROOT / "tools").glob("*.py")]


def load(path):
    if path.is_relative_to(PACKAGE):
        return importlib.import_module(f"detection_toolkit.commands.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"command_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.add_argument("--input", nargs="+")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--confidence-threshold", type=float)
    return parser


@pytest.mark.parametrize(
    "argv",
    [
        ["--input", "a.png", "b=c.png", "--fast", "train.seed=3", "model.x[0].y=a b"],
        ["--input", "a.png", "b=c.png", "--fast", "--opts", "train.seed=3", "model.x[0].y=a b"],
        ["--input", "a.png", "b=c.png", "train.seed=3", "model.x[0].y=a b", "--fast"],
        ["train.seed=3", "--input", "a.png", "b=c.png", "--opts", "model.x[0].y=a b", "--fast"],
    ],
)
def test_overrides_may_stand_anywhere_and_follow_opts_or_not(parser, argv):
    args = parse_arguments(parser, argv)
    assert args.input == ["a.png", "b=c.png"] and args.fast
    assert args.opts == ["train.seed=3", "model.x[0].y=a b"]


def test_a_file_whose_name_looks_like_an_override_is_a_file(parser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.b=c.png").touch()
    args = parse_arguments(parser, ["--input", "a.b=c.png"])
    assert args.input == ["a.b=c.png"] and args.opts == []


def test_after_opts_a_key_needs_no_dot(parser):
    assert parse_arguments(parser, ["--opts", "size=3"]).opts == ["size=3"]
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["size=3"])


@pytest.mark.parametrize("words", [["--epochs", "3"], ["--train.max_iter=1"]])
def test_an_unknown_option_is_told_how_settings_are_written(parser, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(parser, words)
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert f"unrecognized arguments: {words[0]}" in line and "KEY=VALUE, as in" in line


@pytest.mark.parametrize(
    "name", ["a.pth", "a, b.pth", "it's.pth", "1_0", "x\\\\'y", "end\\", "[a]"]
)
def test_weights_are_an_override_whatever_their_name(parser, name):
    args = parse_arguments(parser, ["train.init_checkpoint=b.pth", "--weights", name])
    cfg = apply_overrides(get_config("stageinteractor/shapes_tiny.py"), args.opts)
    assert cfg.train.init_checkpoint == name and cfg.train.allow_partial is False


def test_weights_of_a_run_or_of_the_hub_are_its_config_where_none_is_named(parser, tmp_path):
    run = tmp_path / "a run"
    run.mkdir()
    for name in ("config.yaml", "model_best.pth", "model.bin"):
        (run / name).touch()
    (tmp_path / "alone.pth").touch()
    for given in (str(run), str(run / "model_best.pth"), "hf://OWNER/NAME"):
        args = parse_arguments(parser, ["--weights", given])
        assert (args.config_file, args.opts) == (given, [])
        # Another option that begins alike names no config.
        args = parse_arguments(parser, ["--weights", given, "--confidence-threshold", "0.5"])
        assert (args.config_file, args.opts) == (given, [])
        args = parse_arguments(parser, ["--weights", given, "--config-file", "a.py"])
        assert args.config_file == "a.py" and given in args.opts[0]
    for given in map(str, (run / "gone.pth", run / "model.bin", tmp_path / "alone.pth")):
        args = parse_arguments(parser, ["--weights", given])
        assert args.config_file == parser.get_default("config_file") and given in args.opts[0]


@pytest.mark.parametrize("command", [predict, view_stages])
def test_a_threshold_is_no_config(command, tmp_path):
    for name in ("config.yaml", "m.pth"):
        (tmp_path / name).touch()
    weights = str(tmp_path / "m.pth")
    words = ["--weights", weights, "--confidence-threshold", "0.5", "--input", "a.png"]
    args = parse_arguments(command.get_parser(), words)
    assert (args.config_file, args.opts) == (weights, [])


@pytest.mark.parametrize("words", [["--config-file", "a.py"], ["--config-file=a.py"]])
def test_a_config_that_is_named_stays_however_it_is_written(parser, tmp_path, words):
    for name in ("config.yaml", "model_best.pth"):
        (tmp_path / name).touch()
    assert parse_arguments(parser, ["--weights", str(tmp_path), *words]).config_file == "a.py"


def test_the_folder_of_a_run_without_a_checkpoint_is_no_weights(parser, tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--weights", str(tmp_path)])
    assert f"--weights {tmp_path}: the run has no checkpoint there yet" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--eval-only"], []])
def test_training_begins_from_weights_of_a_run_by_a_config_of_its_own(tmp_path, words):
    for name in ("config.yaml", "model_best.pth"):
        (tmp_path / name).touch()
    weights = str(tmp_path / "model_best.pth")
    args = parse_arguments(train.get_parser("train"), ["--weights", weights, *words])
    assert args.config_file == (weights if words else "")


def test_partial_weights_are_allowed_in_configs_that_do_not_know_of_them(parser):
    cfg = get_config("stageinteractor/shapes_tiny.py")
    args = parse_arguments(parser, ["--allow-partial"])
    assert apply_overrides(cfg, args.opts).train.allow_partial is True
    del cfg.train["allow_partial"]
    assert apply_overrides(cfg, args.opts).train.allow_partial is True


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_reads_overrides_and_thresholds_alike(path):
    source = path.read_text(encoding="utf-8")
    overrides = ("add_overrides_argument(", "add_config_arguments(", "default_argument_parser(")
    if any(text in source for text in overrides) and "def main(" in source:
        assert "parse_arguments(" in source
    # The training command has the positional argument of Detectron2's parser.
    assert ("REMAINDER" in source) == (path.stem == "train")
    if '-threshold"' not in source:
        return
    actions = load(path).get_parser()._actions
    (threshold,) = [a for a in actions if "--confidence-threshold" in a.option_strings]
    assert threshold.default == DEFAULT_SCORE_THRESHOLD
