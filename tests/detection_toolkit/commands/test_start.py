"""How commands start: what ``--help`` loads, and how threads wait for work."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

import patience
import pytest
from detectron2.engine import default_argument_parser

from detection_toolkit import threads
from detection_toolkit.commands import COMMANDS, Group, train
from detection_toolkit.threads import SPINS, SPINS_BESIDE_OTHERS, wait_briefly

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {
    *("torch", "torchvision", "detectron2", "fvcore", "triton", "timm", "transformers"),
    *("numpy", "scipy", "pandas", "matplotlib", "cv2", "PIL", "pycocotools", "hotcoco"),
    *("onnx", "onnxruntime", "onnxscript", "gradio", "tensorboard", "omegaconf", "hydra"),
}
WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Runs a script or a module with --help, and tells what is loaded then, and how threads would wait.
ASK = """
import json, os, runpy, sys
run, name = sys.argv[1:3]
sys.argv[:] = [name, *sys.argv[3:], "--help"]
try:
    getattr(runpy, run)(name, run_name="__main__")
except SystemExit as end:
    code = end.code
modules = sorted({name.split(".")[0] for name in sys.modules})
print("\\n" + json.dumps([code, modules, os.environ.get("GOMP_SPINCOUNT")]))
"""
# These draw or install with Python's own library.
WITHOUT_TOOLKIT = {"draw_architecture", "draw_ideas", "gpu_report", "setup_env"}


def subcommands(commands=COMMANDS, *before: str):
    for name, command in commands.items():
        if isinstance(command, Group):
            yield from subcommands(command.members, *before, name)
        else:
            yield (*before, name)


def commands():
    scripts = [ROOT / "train_net.py", ROOT / "demo" / "demo.py", *(ROOT / "tools").glob("*.py")]
    for script in sorted(scripts):
        if "argparse" in script.read_text() or "import main" in script.read_text():
            yield pytest.param(("run_path", str(script)), id=script.stem)
    for words in [(), *subcommands()]:
        yield pytest.param(("run_module", "detection_toolkit", *words), id=" ".join(words) or "all")
    yield pytest.param(("run_module", "detection_toolkit.web"), id="-m web")


def environment(**variables: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "projects"), str(ROOT)])
    kept = {k: v for k, v in os.environ.items() if k not in WAITS and not k.startswith("KMP_")}
    return {**kept, "PYTHONPATH": paths, **variables}


def ask(*arguments: str, **variables: str):
    command = [sys.executable, "-c", ASK, *arguments]
    result = patience.run(command, env=environment(**variables))
    assert result.returncode == 0, result.stderr
    help_text, answer = result.stdout.rstrip("\n").rsplit("\n", 1)
    assert "usage: " in help_text
    return json.loads(answer)


def test_all_commands_are_found():
    names = [p.id for p in commands()]
    assert {"train_net", "demo", "export", "run_ablation", "view labels", "eval"} <= set(names)


@pytest.mark.parametrize("command", commands())
def test_help_loads_nothing_heavy_and_threads_will_wait_briefly(command):
    code, modules, spins = ask(*command)
    assert not code
    assert not HEAVY & set(modules)
    # PyTorch is not there yet: it will find the variable.
    if Path(command[1]).stem in WITHOUT_TOOLKIT:
        assert "detection_toolkit" not in modules
    else:
        assert spins in (SPINS, SPINS_BESIDE_OTHERS)


def test_what_the_user_has_chosen_stays():
    assert ask("run_path", str(ROOT / "train_net.py"), GOMP_SPINCOUNT="7")[2] == "7"


@pytest.mark.parametrize("name", [*WAITS, "KMP_BLOCKTIME", "KMP_LIBRARY"])
def test_any_choice_of_how_threads_wait_is_left_alone(name):
    environ = {name: "1", "PATH": "/bin"}
    wait_briefly(environ)
    assert environ == {name: "1", "PATH": "/bin"}


@pytest.mark.parametrize(
    "load,expected",
    [
        ("0.00 0.01 0.05 1/120 4242", SPINS),  # the reader alone
        ("9.99 9.99 9.99 4/120 4242", SPINS),  # three others
        ("0.00 0.01 0.05 5/120 4242", SPINS_BESIDE_OTHERS),  # four, whatever was there before
        ("unknown", SPINS),
        ("0.00 0.01 0.05 -/120 4242", SPINS),
        (None, SPINS),
    ],
)
def test_threads_wait_more_briefly_where_all_of_four_cores_have_other_work(
    monkeypatch, tmp_path, load, expected
):
    path = tmp_path / "loadavg"
    if load is not None:
        path.write_text(load)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "LOAD", path)
    environ = {"OMP_NUM_THREADS": "1"}  # is no choice of how threads wait
    wait_briefly(environ)
    assert environ == {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": expected}


def test_the_runtime_of_pytorch_reads_it():
    result = patience.run(
        [sys.executable, "-c", "import detection_toolkit, torch; torch.ones(2)"],
        env=environment(OMP_DISPLAY_ENV="verbose"),
    )
    if "GOMP_" not in result.stderr:
        pytest.skip("PyTorch has another OpenMP runtime here")
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    assert found is not None and found[1] in (SPINS, SPINS_BESIDE_OTHERS)


def test_training_takes_all_that_detectron2_takes():
    def options(parser: argparse.ArgumentParser):
        return {
            a.dest: (a.option_strings, a.nargs, a.type, a.default, type(a)) for a in parser._actions
        }

    theirs, ours = options(default_argument_parser()), options(train.get_parser())
    del theirs["dist_url"], ours["dist_url"]  # a free port by default, not one for each user
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("package", ["engine", "visualization", "web"])
def test_packages_that_import_on_demand_have_all_that_they_name(package):
    module = __import__(f"detection_toolkit.{package}", fromlist=["_"])
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018
