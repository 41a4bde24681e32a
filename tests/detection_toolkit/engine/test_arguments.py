"""Overrides, weights and thresholds have one spelling, whichever command they are given to."""

import importlib.util
import sys
from pathlib import Path

import pytest

from detection_toolkit.commands import configs, export, predict, train, view_labels, view_stages
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine.arguments import add_config_arguments, parse_arguments
from detection_toolkit.engine.parsers import _ELSEWHERE, Parser
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
    parser = Parser(prog="x")
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


@pytest.mark.parametrize(
    "words, said",
    [
        (["--epochs", "3"], "no option --epochs, here it is train.max_epochs=N"),
        (["--input", "a", "epochs=3"], "epochs=3 is no option, here it is train.max_epochs=3"),
        (["--confidence", "--fats"], "no option --fats, did you mean --fast?"),
        (["--inptu=a.png"], "no option --inptu, did you mean --input?"),
        (["source=a.png"], "source=a.png is no option, here it is --input a.png"),
        (["weights=a.pth"], "weights=a.pth is no option, here it is --weights a.pth"),
        (["--weihgts", "a", "--xyz"], "no option --weihgts, did you mean --weights?; no option"),
        (["--xyz\x1b"], "no option '--xyz\\x1b'; settings of the config are KEY=VALUE"),
        (["--train.max_iter=1"], "settings of the config are KEY=VALUE, with dots and no"),
        (["--confidence-threshold", "x"], "argument --confidence-threshold: invalid float value"),
        (["--confidence-threshold"], "argument --confidence-threshold: expected one argument"),
        (["--c", "1"], "ambiguous option: --c could match --config-file, --confidence-threshold"),
    ],
)
def test_a_wrong_option_is_two_lines_that_name_the_nearest(parser, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(parser, words)
    assert ended.value.code == 2
    line, where = capsys.readouterr().err.splitlines()
    assert line.startswith("x: error: ") and said in line and line.isprintable()
    assert where == "x --help lists the options"


@pytest.mark.parametrize(
    "words, said",
    [
        (["data=my.yaml", "epochs=3"], "data=my.yaml is no option, here it is --data my.yaml; ep"),
        (["--data", "a", "--device=cpu"], "no option --device, here it is train.device=cpu"),
        (["--data", "a", "device=cpu"], "device=cpu is no option, here it is train.device=cpu"),
        (["resume=True"], "resume=True is no option, here it is --resume"),
        (["my.yaml", "--num-gpus", "1"], "my.yaml is no option, data are named as --data my.yaml"),
        (["--data", "a", "model=b.pt"], "model=b.pt is no option, here it is --weights b.pt"),
        (["--data", "a", "nonsense"], "nonsense is no option; settings of the config"),
        (["--source", "a"], "no option --source; settings"),  # of another command
    ],
)
def test_words_of_other_projects_are_answered_by_training(words, said, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(train.get_parser("x"), words)
    line, _ = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    "command, words, dest",
    [
        (train, ["--data=x"], "data"),
        (train, ["--config-file=x"], "config_file"),
        (predict, ["--input", "a.png", "--output=x"], "output"),
        (predict, ["--input", "a.png", "--save-json=x"], "save_json"),
        (export, ["--output=x"], "output"),
        (view_labels, ["--output=x"], "output"),
    ],
)
def test_options_may_have_their_value_behind_an_equals_sign(command, words, dest):
    """Also those that are called as a setting of another project is."""
    assert str(getattr(parse_arguments(command.get_parser("x"), words), dest)) == "x"


def test_a_group_of_the_config_may_be_called_as_settings_of_others_are():
    words = ["--config-file", "a.py", "model={a:1}", "+seed=3", "train.seed=2"]
    assert parse_arguments(train.get_parser("x"), words).opts == [words[2], words[3], words[4]]


def test_answers_are_options_and_keys_that_there_are():
    options = {o for c in (train, predict) for o in c.get_parser("x").options()}
    cfg = get_config("stageinteractor/stageinteractor_tiny_custom.py")
    for answer in set(_ELSEWHERE.values()):
        if answer.startswith("--"):
            assert answer.split()[0] in options
        else:
            value = answer.partition("=")[2]
            key = answer.partition("=")[0]
            apply_overrides(cfg, [f"{key}=1" if value in ("N", "X") else answer])


def test_commands_without_a_config_name_the_nearest_option_too(capsys):
    with pytest.raises(SystemExit) as ended:
        configs.main(["--descirbe"], prog="y")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "y: error: no option --descirbe, did you mean --describe?",
        "y --help lists the options",
    ]


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
