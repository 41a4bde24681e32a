"""The command of the installed project: its subcommands, their help, and what it says of others."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import patience
import pytest

from detection_toolkit import __version__, program
from detection_toolkit.commands import COMMANDS, Command, Group, completion, load, main
from detection_toolkit.config import config_names
from detection_toolkit.engine import parsers
from detection_toolkit.engine.arguments import parse_arguments
from detection_toolkit.engine.shipped import shipped_config


def leaves(commands=COMMANDS, words=()):
    """(words, command) of all that can be called."""
    for name, command in commands.items():
        if isinstance(command, Group):
            yield from leaves(command.members, (*words, name))
        else:
            yield (*words, name), command


LEAVES = dict(leaves())
IDS = {"ids": " ".join}


def ended_by(argv):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    return ended.value.code


def read_plainly(parser, argv):
    return parser.parse_args(argv)


def test_all_that_was_promised_is_there():
    promised = "train eval predict export check report view web convert configs"
    assert set(promised.split()) <= set(COMMANDS)


@pytest.mark.parametrize("argv", [[], ["--help"], ["view"], ["view", "-h"]])
def test_help_names_the_commands_and_imports_none_of_them(argv):
    code = (
        "import sys\n"
        "from detection_toolkit.commands import main\n"
        f"main({argv})\n"
        "print([m for m in sys.modules if m.startswith('detection_toolkit.commands.')])"
    )
    done = patience.run([sys.executable, "-c", code], check=True)
    *shown, imported = done.stdout.splitlines()
    assert imported == "[]"
    expected = COMMANDS[argv[0]].members if argv[:1] == ["view"] else COMMANDS
    for name, command in expected.items():
        assert [line for line in shown if line.split() == [name, *command.summary.split()]]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("words", LEAVES, **IDS)
def test_each_command_has_help_with_examples_that_parse(words, capsys):
    assert ended_by([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    prog = f"{program.program()} {' '.join(words)}"
    assert shown.startswith(f"usage: {prog} [-h]")
    lines = [line.strip() for line in shown.splitlines() if line.startswith(f"  {prog}")]
    assert lines, "no example"
    parser = load(LEAVES[words]).get_parser(prog)
    for line in lines:
        arguments = shlex.split(line.removeprefix(prog).partition(" > ")[0], comments=True)
        has_overrides = any(action.dest == "opts" for action in parser._actions)
        args = (parse_arguments if has_overrides else read_plainly)(parser, arguments)
        if getattr(args, "config_file", None) and args.config_file.count("/") == 1:
            assert args.config_file in config_names()


def test_the_name_of_the_command_is_in_usage_errors(capsys):
    assert ended_by(["configs", "--no-such-option"]) == 2
    assert f"{program.program()} configs: error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["trian"], "train"),
        (["Export"], "export"),
        (["val"], "eval"),
        (["detect"], "predict"),
        (["view", "stage"], "stages"),
        (["convert", "checkpoints"], "checkpoint"),
    ],
)
def test_an_unknown_command_names_the_nearest(argv, near):
    text = ended_by(argv)
    assert text.startswith(f"error: no command {argv[-1]}: did you mean {near}? There are ")
    assert "\n" not in text


@pytest.mark.parametrize("argv", [["xyz"], ["\x1b[2J"], ["--config-file", "a.py"]])
def test_whatever_else_is_no_command_is_one_line(argv):
    text = ended_by(argv)
    assert text.startswith("error: ") and text.isprintable()
    assert "did you mean" not in text and ", ".join(COMMANDS) in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--config-file", "stageinteractor/shapes_tniy.py"], "shapes_tiny.py"),
        (["eval", "--config-file", "no.py"], "config file no.py does not exist"),
        (["train"], f"a config, as --config-file {shipped_config()}"),
        (["report", "no/such/folder"], "no folder no/such/folder"),
        (["configs", "nothing_has_this"], "no config has nothing_has_this in its name"),
    ],
)
def test_errors_of_commands_are_one_line(argv, message):
    text = ended_by(argv)
    assert text.startswith("error: ") and message in text and "\n" not in text


def test_eval_is_train_eval_only():
    evaluation, training = (load(COMMANDS[name]).get_parser("x") for name in ("eval", "train"))
    arguments = ["--config-file", "a.py", "train.seed=1"]
    args = parse_arguments(evaluation, arguments)
    assert args == parse_arguments(training, ["--eval-only", *arguments]) and args.eval_only
    assert not parse_arguments(training, arguments).eval_only


def test_configs_are_listed_by_name_and_with_what_they_say(capsys):
    assert main(["configs"]) == 0
    assert capsys.readouterr().out.splitlines() == config_names()
    assert main(["configs", "shapes_tiny", "stageinteractor/", "--describe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stageinteractor/shapes_tiny.py"
    assert lines[1] == "    The tiny model on the built-in shapes, from scratch on two CPU cores."
    assert lines[2].endswith("configs/stageinteractor/shapes_tiny.py")


@pytest.mark.parametrize(
    ("called", "expected"),
    [("/usr/bin/a_command", "a_command report"), ("tools/x.py", "python tools/report.py")],
)
def test_messages_name_the_command_as_it_can_be_called(called, expected, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(program, "command_names", lambda: {"a_command"})
    monkeypatch.setattr(sys, "argv", [called, "train"])
    assert program.command_line("report") == expected
    monkeypatch.setattr(program, "IS_CHECKOUT", False)
    installed = expected if "tools" not in expected else "python -m detection_toolkit report"
    assert program.command_line("report") == installed


def test_scripts_that_messages_name_are_there():
    root = Path(__file__).resolve().parents[3]
    for name, script in program._SCRIPTS.items():
        assert tuple(name.split()) in LEAVES
        module = LEAVES[tuple(name.split())].module.replace("evaluate", "train")
        text = (root / script.split()[0]).read_text(encoding="utf-8")
        assert f"from detection_toolkit.{module} import main" in text


# -- completion -----------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    pytest.importorskip("shtab")
    monkeypatch.setattr(completion, "command_names", lambda: {"detect"})


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_is_printed_for_every_shell(installed, shell, capsys):
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    for word in ("detect", "train", "--config-file", "--no-such-option"):
        assert (word in shown) == (word != "--no-such-option")


def test_bash_completes_commands_options_configs_and_files(installed, tmp_path, capsys):
    main(["completion", "bash"])
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "stage.jpg").touch()

    def complete(*words):
        code = (
            f"source {script}; COMP_WORDS=({shlex.join(['detect', *words])}); "
            f"COMP_CWORD={len(words)}; $(complete -p detect | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            [shutil.which("bash"), "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        return done.stdout.split()

    assert complete("tr") == ["train"]
    assert complete("view", "") == ["stages", "labels", "data"]
    assert complete("predict", "--conf") == ["--config-file", "--confidence-threshold"]
    assert complete("train", "--config-file", "stageinteractor/shapes_tiny.") == [shipped_config()]
    assert complete("predict", "--input", "sta") == ["stage.jpg"]


def test_completion_without_its_library_or_an_installed_command_says_so(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install shtab" in ended_by(["completion", "bash"])
    monkeypatch.setattr(completion, "command_names", set)
    assert "no command to complete" in ended_by(["completion", "bash"])


def test_the_parser_of_all_knows_each_command():
    parser = completion.full_parser("x")
    for words in LEAVES:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([*words, "--help"])
        assert ended.value.code == 0


def test_examples_replace_what_stands_for_the_command():
    text = parsers.examples("\nPROG a CONFIG\n  PROG b\n", "x y")
    assert text == f"examples:\n  x y a {shipped_config()}\n    x y b"
    assert isinstance(parsers.make_parser("d", "PROG", "x"), argparse.ArgumentParser)


def test_a_table_names_modules_that_are_there():
    assert all(isinstance(command, Command) for command in LEAVES.values())
    for command in LEAVES.values():
        assert callable(load(command).main) and callable(load(command).get_parser)
