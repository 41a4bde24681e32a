"""The set-up script: what it decides, what it runs, and that it recovers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup_env"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup_env = load_script()
Interpreter, make_plan = setup_env.Interpreter, setup_env.make_plan

UV = "/opt/uv"
OWN = {"torch": "2.1.0", "torchvision": "0.16.0", "numpy": "1.26.4", "detectron2": "0.6"}


class FakeMachine:
    """Stands in for ``subprocess.run``: an environment whose packages are a set of names.

    Args:
        base: what the calling interpreter can import, module -> version.
        broken: modules that it has but cannot import.
        fail_on: pip fails when one of its arguments contains this text.
        interrupt_on: the user interrupts pip when it has this argument.
        uv_fails_on: as ``fail_on``, for uv.
        pip_settings: what ``pip config list`` prints.
    """

    def __init__(
        self,
        venv: Path,
        base=None,
        *,
        broken=None,
        fail_on=None,
        interrupt_on=None,
        uv_fails_on=None,
        pip_settings="",
    ):
        self.venv = venv
        self.uv_fails_on = uv_fails_on
        self.pip_settings = pip_settings
        self.base = dict(base or {})
        self.broken = dict(broken or {})
        self.fail_on = fail_on
        self.interrupt_on = interrupt_on
        self.own: dict[str, str] = {}
        self.has_pip = False
        self.commands: list[list[str]] = []
        self.pip_arguments: list[list[str]] = []
        self.constraints: list[str] = []

    def __call__(self, command, **_):
        self.commands.append(list(command))
        python, *arguments = command
        if python == UV:
            return self._done(command, code=self._uv(arguments))
        inside = python == str(self.venv / "bin" / "python")
        if inside and not Path(python).exists():
            raise FileNotFoundError(python)
        if arguments[:1] == ["-c"]:
            return self._done(command, stdout=self._evaluate(arguments, inside))
        module, *arguments = arguments[1:]
        if module == "venv":
            self._make_venv("--system-site-packages" in arguments)
            return self._done(command)
        if module == "ensurepip":
            self.has_pip = True
            return self._done(command)
        if not self.has_pip:
            return self._done(command, code=1)
        if arguments == ["config", "list"]:
            return self._done(command, stdout=self.pip_settings)
        return self._done(command, code=self._pip(arguments))

    @staticmethod
    def _done(command, *, code=0, stdout=""):
        return subprocess.CompletedProcess(command, code, stdout=stdout)

    def _evaluate(self, arguments, inside):
        if "purelib" in arguments[1]:
            return f"{self.venv / 'lib'}\n"
        found = {**self.base, **self.own} if self._shared() else self.own
        if not inside:
            found = self.base
        names = arguments[2:]
        versions = {name: found[name] for name in names if name in found}
        answer = {"versions": versions, "installed": versions, "errors": self.broken}
        return json.dumps({**answer, "errors": {}} if inside else answer)

    def _shared(self):
        config = self.venv / "pyvenv.cfg"
        return config.exists() and "= true" in config.read_text()

    def _make_venv(self, shared):
        (self.venv / "bin").mkdir(parents=True, exist_ok=True)
        (self.venv / "lib").mkdir(exist_ok=True)
        (self.venv / "bin" / "python").touch()
        value = "true" if shared else "false"
        (self.venv / "pyvenv.cfg").write_text(f"include-system-site-packages = {value}\n")
        self.has_pip = True

    def _uv(self, arguments):
        assert arguments[:4] == ["pip", "install", "--python", str(self.venv / "bin" / "python")]
        words = {"--log", "--no-input", "--no-warn-conflicts", "--disable-pip-version-check"}
        assert not words & {*arguments}, "uv knows no such option"
        if self.uv_fails_on and any(self.uv_fails_on in word for word in arguments):
            return 2
        return self._pip(arguments)

    def _pip(self, arguments):
        if self.interrupt_on and self.interrupt_on in arguments:
            raise KeyboardInterrupt
        arguments = self._with_files(arguments)
        self.pip_arguments.append(arguments)
        if self.fail_on and any(self.fail_on in argument for argument in arguments):
            return 1
        if "--constraint" in arguments:
            path = arguments[arguments.index("--constraint") + 1]
            self.constraints = Path(path).read_text().split()
        if "--target" in arguments:
            target = Path(arguments[arguments.index("--target") + 1])
            for name in ("detectron2", "tools", "sal_detectron2-0.7.2.dist-info"):
                (target / name).mkdir()
            for name in ("RECORD", "INSTALLER"):
                (target / "sal_detectron2-0.7.2.dist-info" / name).touch()
        for argument in arguments:
            if argument.startswith(("torch==", "torchvision==", "opencv-python-headless")):
                name = argument.split("=")[0]
                self.own[{"opencv-python-headless": "cv2"}.get(name, name)] = "pinned"
        if (self.venv / "lib" / "detectron2").is_dir():
            self.own["detectron2"] = "0.7.2"
        return 0

    @staticmethod
    def _with_files(arguments):
        """The arguments, with the lines of a requirement file after its name."""
        result = []
        for previous, argument in zip(["", *arguments], arguments):
            result.append(argument)
            if previous == "-r":
                result += Path(argument).read_text().splitlines()
        return result

    def installed(self) -> str:
        """All that pip was told to install, as one text with spaces around each part."""
        return f" {' '.join(part for arguments in self.pip_arguments for part in arguments)} "


def set_up(machine: FakeMachine, *, uv: str | None = None) -> list[str]:
    said: list[str] = []
    environment = setup_env.Environment(machine.venv, uv=uv, run=machine, say=said.append)
    setup_env.set_up(environment, say=said.append)
    return said


@pytest.fixture
def venv(tmp_path) -> Path:
    return tmp_path / ".venv"


# -- decisions ------------------------------------------------------------------------------------


def test_an_empty_environment_gets_everything_pinned():
    plan = make_plan(Interpreter(), shared=False)
    assert plan.torch and plan.detectron2 and plan.pinned and plan.opencv
    assert plan.constraints == ()


def test_shared_packages_are_kept_and_held_in_their_versions():
    plan = make_plan(Interpreter(OWN, OWN), shared=True)
    assert not plan.torch and not plan.detectron2 and not plan.pinned
    assert plan.constraints == ("torch==2.1.0", "torchvision==0.16.0", "numpy==1.26.4")


def test_versions_are_held_as_pip_knows_them():
    present = Interpreter(
        {"torch": "2.11.0+cu130", "torchvision": "0.26.0+cu130", "numpy": "2.4.6"},
        {"torch": "2.11.0", "numpy": "2.4.6"},
    )
    assert make_plan(present, shared=True).constraints == ("torch==2.11.0", "numpy==2.4.6")


def test_torch_without_torchvision_is_incomplete():
    plan = make_plan(Interpreter({"torch": "2.1.0"}), shared=False)
    assert plan.torch


def test_a_detectron2_that_does_not_import_counts_as_absent():
    present = Interpreter(
        {"torch": "2.1.0", "torchvision": "0.16.0"}, errors={"detectron2": "no _C"}
    )
    assert make_plan(present, shared=True).detectron2


def test_any_opencv_is_enough():
    assert not make_plan(Interpreter({"cv2": "4.8.0"}), shared=True).opencv
    lines = ["numpy", "opencv-python-headless==5.0", "scipy"]
    assert setup_env.without_opencv(lines) == ["numpy", "scipy"]


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 19)])
def test_an_old_python_is_refused_with_the_way_out(version):
    with pytest.raises(setup_env.SetupError, match=r"Python 3\.10 or newer.*PYTHON="):
        setup_env.check_python_version(version, "/usr/bin/python3")


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 14, 0)])
def test_newer_pythons_are_accepted(version):
    setup_env.check_python_version(version, "/usr/bin/python3")


def test_requirement_files_are_read_without_comments_options_and_hashes(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# head\n-c other.txt\nnumpy==2.4.6 ; python_version >= '3.11'  # via scipy\n\n"
        "wheel==1.0 --hash=sha256:00\n"
    )
    assert setup_env.read_requirements(path) == [
        "numpy==2.4.6 ; python_version >= '3.11'",
        "wheel==1.0",
    ]
    with pytest.raises(setup_env.SetupError, match="missing"):
        setup_env.read_requirements(tmp_path / "absent.txt")


# -- what is run ----------------------------------------------------------------------------------


def test_without_anything_the_pinned_versions_are_installed(venv):
    machine = FakeMachine(venv)
    set_up(machine)
    installed = machine.installed()
    assert "torch==2.11.0" in installed and "torchvision==0.26.0" in installed
    assert "scipy==" in installed and "pytest==" in installed
    assert "--require-hashes" in installed and "detectron2.txt" in installed
    (alone,) = [a for a in machine.pip_arguments if any("trackers==" in word for word in a)]
    assert "--no-deps" in alone  # it requires another OpenCV
    assert machine.commands[-2][-2:] == ["--editable", str(ROOT)], "the project comes last"
    assert (venv / "lib" / "detectron2").is_dir()
    assert not (venv / "lib" / "tools").exists()
    assert "torch pinned" in (venv / ".ready").read_text()


def test_an_existing_detectron2_is_used_and_not_installed(venv):
    machine = FakeMachine(venv, OWN)
    said = "\n".join(set_up(machine))
    installed = machine.installed()
    assert "detectron2.txt" not in installed
    assert "torch==" not in installed
    assert "scipy==" not in installed and " scipy " in installed
    assert machine.constraints == ["torch==2.1.0", "torchvision==0.16.0", "numpy==1.26.4"]
    assert "detectron2 0.6" in said and "keep it" in said


def test_torch_alone_is_kept_and_detectron2_added(venv):
    machine = FakeMachine(venv, {key: OWN[key] for key in ("torch", "torchvision", "numpy")})
    set_up(machine)
    assert "torch==" not in machine.installed()
    assert "detectron2.txt" in machine.installed()


def test_a_broken_detectron2_outside_is_reported_and_replaced_inside(venv):
    base = {key: OWN[key] for key in ("torch", "torchvision", "numpy")}
    machine = FakeMachine(venv, base, broken={"detectron2": "ImportError: no _C"})
    said = "\n".join(set_up(machine))
    assert "detectron2 does not import" in said and "no _C" in said
    assert "detectron2.txt" in machine.installed()


def test_nothing_is_ever_installed_into_the_calling_interpreter(venv):
    for base in ({}, OWN):
        machine = FakeMachine(venv, base)
        set_up(machine)
        outside = [c for c in machine.commands if c[0] != str(venv / "bin" / "python")]
        assert {tuple(c[1:3]) for c in outside if c[1] == "-m"} <= {("-m", "venv")}


def test_a_second_run_installs_neither_torch_nor_detectron2(venv):
    machine = FakeMachine(venv)
    set_up(machine)
    machine.commands.clear()
    machine.pip_arguments.clear()
    set_up(machine)
    assert "torch==" not in machine.installed()
    assert "detectron2.txt" not in machine.installed()
    assert not any("venv" in command[1:3] for command in machine.commands)
    assert (venv / ".ready").exists()


def test_a_detectron2_put_into_the_environment_by_hand_is_kept(venv):
    machine = FakeMachine(venv)
    machine._make_venv(shared=False)
    machine.own["detectron2"] = "0.6+git"
    set_up(machine)
    assert "torch==2.11.0" in machine.installed()
    assert "detectron2.txt" not in machine.installed()


def test_packages_of_a_calling_virtual_environment_are_seen(venv, monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/somewhere/environment")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(
        setup_env.sysconfig,
        "get_paths",
        lambda: {"purelib": "/somewhere/environment/lib", "platlib": "/somewhere/environment/lib"},
    )
    set_up(FakeMachine(venv, OWN))
    (line,) = (venv / "lib" / setup_env.SHARED_PTH_NAME).read_text().splitlines()
    assert line == "import site; site.addsitedir('/somewhere/environment/lib')"


# -- uv -------------------------------------------------------------------------------------------


def installs(machine: FakeMachine, program: str) -> list[list[str]]:
    """What uv or pip was told to install, without what only one of the two is told."""
    heads = {"uv": [UV, "pip", "install", "--python"], "pip": ["-m", "pip", "install"]}
    pips = {"--disable-pip-version-check", "--no-input", "--no-warn-conflicts", "--quiet", "--log"}
    found = []
    for command in machine.commands:
        words = command if program == "uv" else command[1:]
        head = heads[program]
        if words[: len(head)] != head:
            continue
        # Files of requirements lie in a new folder each time, whose name does not count.
        words = [Path(w).name if w.startswith("/") and w != str(ROOT) else w for w in words]
        if "--target" in words:
            words[words.index("--target") + 1] = "FOLDER"
        found.append([w for w in words[len(head) :] if w not in {*pips, "pip.log", "python"}])
    return found


def test_uv_installs_the_same_as_pip_where_there_is_one(venv, tmp_path):
    by_pip, by_uv = FakeMachine(tmp_path / "pip"), FakeMachine(venv)
    set_up(by_pip)
    said = set_up(by_uv, uv=UV)
    assert f"{UV} installs" in said
    assert len(installs(by_uv, "uv")) == 5 and not installs(by_uv, "pip")
    assert installs(by_uv, "uv") == installs(by_pip, "pip")
    assert "torch==2.11.0" in by_uv.installed() and "--require-hashes" in by_uv.installed()
    assert (venv / "lib" / "detectron2").is_dir() and (venv / ".ready").exists()


@pytest.mark.parametrize(
    ("base", "settings", "reason"),
    [
        (OWN, "", "uses packages of another environment"),
        ({}, "global.index-url='https://mirror/simple'\n", "does not read (index-url)"),
        ({}, ":env:.no-index='1'\n:env:.find-links='wheels'\n", "(find-links, no-index)"),
    ],
)
def test_where_uv_would_install_something_else_pip_does(venv, base, settings, reason):
    machine = FakeMachine(venv, base, pip_settings=settings)
    said = set_up(machine, uv=UV)
    (line,) = [line for line in said if "pip installs, and not uv" in line]
    assert reason in line
    assert not installs(machine, "uv") and installs(machine, "pip")


def test_settings_of_pip_that_do_not_count_leave_uv_alone():
    listed = ":env:.disable-pip-version-check='1'\nglobal.timeout='60'\ndownload.no-index='1'\n"
    assert setup_env.settings_of_pip(listed) == []
    assert setup_env.settings_of_pip("install.extra_index_url='x'") == ["extra-index-url"]


@pytest.mark.parametrize("fails_on", ["setuptools", "needed.txt", "detectron2.txt", "--editable"])
def test_what_uv_cannot_install_pip_tries_with_one_line(venv, fails_on):
    machine = FakeMachine(venv, uv_fails_on=fails_on)
    said = set_up(machine, uv=UV)
    (line,) = [line for line in said if "pip tries it" in line]
    assert "exit code 2" in line
    assert (venv / ".ready").exists()
    assert installs(machine, "uv")[-1] == installs(machine, "pip")[0]
    assert len(installs(machine, "uv") + installs(machine, "pip")) == 6  # uv is asked no more


def test_what_neither_can_install_is_pips_error(venv):
    machine = FakeMachine(venv, fail_on="torch==")
    with pytest.raises(setup_env.SetupError, match="pip could not install the packages"):
        set_up(machine, uv=UV)


# -- failure and recovery -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail_on", "what"),
    [
        ("setuptools", "setuptools"),
        ("torch==", "the packages of requirements/"),
        ("detectron2.txt", "Detectron2"),
        ("--editable", "this project"),
    ],
)
def test_a_failing_pip_is_reported_and_the_next_run_completes(venv, fail_on, what):
    machine = FakeMachine(venv, fail_on=fail_on)
    with pytest.raises(setup_env.SetupError, match=f"could not install {what}.*dependencies.md"):
        set_up(machine)
    assert not (venv / ".ready").exists()
    machine.fail_on = None
    set_up(machine)
    assert (venv / ".ready").exists()


def test_an_interrupted_run_leaves_no_stamp_and_the_next_completes(venv):
    machine = FakeMachine(venv)
    set_up(machine)
    machine.interrupt_on = "--editable"
    with pytest.raises(KeyboardInterrupt):
        set_up(machine)
    assert not (venv / ".ready").exists()
    machine.interrupt_on = None
    set_up(machine)
    assert (venv / ".ready").exists()


def test_a_package_that_pip_or_uv_was_killed_over_is_installed_again(venv):
    machine = FakeMachine(venv)
    set_up(machine)
    left = {
        "whole-1.0": ("METADATA", "INSTALLER", "RECORD"),
        "half-2.0": ("METADATA", "INSTALLER"),  # by pip
        "quarter-3.0": ("METADATA", "RECORD"),  # by uv, whose wheel's RECORD comes with the rest
    }
    for name, files in left.items():
        folder = venv / "lib" / f"{name}.dist-info"
        folder.mkdir()
        for file in files:
            (folder / file).touch()
    said = "\n".join(set_up(machine))
    assert "half-2.0 was not installed completely" in said and "whole" not in said
    assert "quarter-3.0 was not installed completely" in said and "detectron2-" not in said
    assert not (venv / "lib" / "half-2.0.dist-info").exists()
    assert not (venv / "lib" / "quarter-3.0.dist-info").exists()
    assert (venv / "lib" / "whole-1.0.dist-info").is_dir()


def test_an_environment_without_pip_gets_it_and_keeps_its_packages(venv):
    machine = FakeMachine(venv)
    set_up(machine)
    machine.has_pip = False
    machine.commands.clear()
    machine.pip_arguments.clear()
    set_up(machine)
    assert any(command[1:3] == ["-m", "ensurepip"] for command in machine.commands)
    assert "torch==" not in machine.installed()


def test_an_environment_whose_python_is_gone_is_made_anew(venv):
    machine = FakeMachine(venv)
    set_up(machine)
    (venv / "bin" / "python").unlink()
    machine.own.clear()
    set_up(machine)
    made = [command for command in machine.commands if command[1:3] == ["-m", "venv"]]
    assert len(made) == 2 and "--clear" in made[1]


def test_an_environment_that_does_not_work_in_the_end_is_an_error(venv, monkeypatch):
    machine = FakeMachine(venv)
    monkeypatch.setattr(setup_env.Environment, "install_detectron2", lambda self: None)
    with pytest.raises(setup_env.SetupError, match="does not work"):
        set_up(machine)
    assert not (venv / ".ready").exists()


def test_the_command_ends_with_an_error_code_and_no_traceback(venv, monkeypatch, capsys):
    def fail(*_, **__):
        raise setup_env.SetupError("no network")

    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--venv", str(venv)])
    monkeypatch.setattr(setup_env, "set_up", fail)
    assert setup_env.main() == 1
    assert "set-up failed: no network" in capsys.readouterr().err


# -- the wheel ------------------------------------------------------------------------------------


def unpacked_wheel(folder: Path) -> Path:
    for name in ("detectron2/engine", "tools", "sal_detectron2-0.7.2.dist-info"):
        (folder / name).mkdir(parents=True)
    (folder / "detectron2" / "__init__.py").write_text("new")
    return folder


def test_detectron2_is_moved_without_its_tools(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    setup_env.install_unpacked_detectron2(unpacked_wheel(tmp_path / "wheel"), site)
    assert {path.name for path in site.iterdir()} == {
        "detectron2",
        "sal_detectron2-0.7.2.dist-info",
    }


def test_a_half_installed_detectron2_is_replaced_as_a_whole(tmp_path):
    site = tmp_path / "site"
    (site / "detectron2").mkdir(parents=True)
    (site / "detectron2" / "left_over.py").touch()
    setup_env.install_unpacked_detectron2(unpacked_wheel(tmp_path / "wheel"), site)
    assert (site / "detectron2" / "__init__.py").read_text() == "new"
    assert not (site / "detectron2" / "left_over.py").exists()


def test_a_wheel_without_detectron2_is_an_error(tmp_path):
    with pytest.raises(setup_env.SetupError, match="holds no detectron2"):
        setup_env.install_unpacked_detectron2(tmp_path, tmp_path)


# -- for real -------------------------------------------------------------------------------------


def test_a_real_environment_sees_the_detectron2_of_this_interpreter(venv):
    """Up to the point where packages would be downloaded."""
    said: list[str] = []
    environment = setup_env.Environment(venv, say=said.append)
    environment.ensure_created()
    assert environment.is_shared()
    present = environment.probe()
    plan = make_plan(present, shared=True)
    assert present.has("torch", "torchvision", "detectron2", "cv2") and not present.errors
    for name in ("torch", "torchvision", "numpy"):
        assert f"{name}=={importlib.metadata.version(name)}" in plan.constraints
    assert not plan.torch and not plan.detectron2
    environment.ensure_created()
    assert "keep it" in said[-1]


# -- Makefile and CI ------------------------------------------------------------------------------


def make(folder: Path, *arguments: str) -> str:
    # Under `make test` this would count as a recursive make, which prints more and shares flags.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    result = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files that make looks at, with an environment that was set up after them."""
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name in ("tools/setup_env.py", "requirements/runtime.txt", ".venv/.ready"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "target",
    ["demo", "test", "test-isa", "lint", "ablation", "ablation-smoke", "shapes-checkpoint"],
)
def test_every_target_sets_up_only_when_something_changed(checkout, target):
    assert "setup_env.py" not in make(checkout, "-n", target)
    (checkout / ".venv" / ".ready").unlink()
    commands = make(checkout, "-n", target, "PYTHON=/my/python")
    assert commands.splitlines()[0].startswith("/my/python tools/setup_env.py")
    assert len(commands.splitlines()) > 1


@pytest.mark.parametrize(
    ("isa", "setting"),
    [
        ("avx2", "ATEN_CPU_CAPABILITY=avx2 "),
        ("default", "ATEN_CPU_CAPABILITY=default "),
        ("onednn", "ONEDNN_MAX_CPU_ISA=AVX2 "),
    ],
)
def test_the_tests_run_with_other_instructions(checkout, isa, setting):
    # `make test-isa ISA=...` exports ISA to what it runs, this test included.
    plain = make(checkout, "-n", "test-all", "ARGS=-k matcher")
    assert make(checkout, "-n", "test-isa", f"ISA={isa}", "ARGS=-k matcher") == setting + plain
    with pytest.raises(AssertionError, match="ISA=sse is none of avx2, default, onednn"):
        make(checkout, "-n", "test-isa", "ISA=sse")


def test_help_lists_the_targets_and_needs_no_environment(checkout):
    (checkout / ".venv" / ".ready").unlink()
    listed = make(checkout)
    for target in ("demo", "test", "lint", "clean", "shapes-checkpoint", "help"):
        assert f"\n  {target} " in listed
    assert "set-up" not in listed


@pytest.mark.parametrize("failing", [None, "lint", "test", "test-all", "docs", "ablation-smoke"])
def test_ci_runs_every_step_and_fails_if_one_does(tmp_path, failing):
    steps = ("lint", "test", "test-all", "docs", "ablation-smoke")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "Makefile").write_text(
        "".join(f"{step}:\n\techo ran {step}; exit {int(step == failing)}\n" for step in steps)
    )
    result = subprocess.run(
        ["bash", ".ci/run"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "CI"},  # in which a browser is installed
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == (failing is not None)
    for step in steps:
        assert f"ran {step}\n" in result.stdout
