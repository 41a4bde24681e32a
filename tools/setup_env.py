"""Make the virtual environment that ``make`` works in.

    python3 tools/setup_env.py [--venv .venv]

Runs with the interpreter it is called with and needs the standard library only. What is there is
kept, only what is missing is installed:

- If PyTorch and torchvision import in the calling interpreter, the environment sees that
  interpreter's packages, and they are not installed again; likewise Detectron2. Nothing is ever
  written to the calling interpreter.
- Otherwise the environment is isolated and gets the versions pinned in requirements/; by uv, which
  is faster than pip, where there is a uv on PATH.

A second run changes nothing. A run that was interrupted is completed by the next one: the file
``.ready`` in the environment, on which the Makefile depends, is written last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
MIN_PYTHON = (3, 10)
STAMP_NAME = ".ready"
SHARED_PTH_NAME = "_shared_environment.pth"

# Compiled against each other: where these are kept, pip must not replace one of them to please
# another package.
KEPT_TOGETHER = ("torch", "torchvision", "numpy")

# Settings of pip that uv, which does not read them, may go without. Others say where packages come
# from, or which.
NEEDLESS_FOR_UV = (
    *("cache-dir", "config-file", "default-timeout", "disable-pip-version-check", "no-cache-dir"),
    *("no-color", "no-input", "no-warn-script-location", "progress-bar", "quiet", "retries"),
    *("require-virtualenv", "root-user-action", "timeout", "verbose"),
)

PROBE = """
import contextlib, importlib, importlib.metadata, io, json, sys
found, installed, errors = {}, {}, {}
for name in sys.argv[1:]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module = importlib.import_module(name)
        found[name] = str(getattr(module, "__version__", "unknown"))
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            errors[name] = f"{type(error).__name__}: {error}"
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
print(json.dumps({"versions": found, "installed": installed, "errors": errors}))
"""


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Interpreter:
    """What a Python interpreter can import.

    Args:
        versions: module name -> version of the modules that import, as they state it.
        installed: module name -> version that pip knows, if any. The wheel of PyTorch on PyPI
            states 2.11.0+cu130 and is installed as 2.11.0.
        errors: module name -> error of the modules that are there and do not import.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    installed: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)

    def has(self, *names: str) -> bool:
        return all(name in self.versions for name in names)


@dataclass(frozen=True)
class Plan:
    """What to install, given what is there.

    Args:
        torch: install the pinned PyTorch and torchvision.
        detectron2: install the pinned Detectron2 wheel.
        pinned: install run-time packages in their pinned versions; otherwise any version that
            is there and suits is kept.
        opencv: install OpenCV with the other run-time packages.
        constraints: requirements that pip must not break while it installs the rest.
    """

    torch: bool
    detectron2: bool
    pinned: bool
    opencv: bool
    constraints: tuple[str, ...]


def make_plan(present: Interpreter, *, shared: bool) -> Plan:
    """Decide what the environment lacks.

    Args:
        present: what the environment can import.
        shared: whether it sees the packages of the interpreter it was made with. Versions of
            those may differ from the pins, and they fit each other, so the pins do not apply.
    """
    kept = [name for name in KEPT_TOGETHER if name in present.installed]
    return Plan(
        torch=not present.has("torch", "torchvision"),
        detectron2=not present.has("detectron2"),
        pinned=not shared,
        # The distributions opencv-python, -headless, -contrib all hold the module cv2; installing
        # one over another breaks both.
        opencv=not present.has("cv2"),
        constraints=tuple(f"{name}=={present.installed[name]}" for name in kept) if shared else (),
    )


def read_requirements(path: Path) -> list[str]:
    """The requirement lines of a file, without comments, options and hashes.

    Raises:
        SetupError: the file does not exist.
    """
    if not path.is_file():
        raise SetupError(f"{path} is missing; is this a complete checkout?")
    lines = (re.split("#|--hash", line)[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def without_opencv(requirements: Iterable[str]) -> list[str]:
    return [line for line in requirements if not line.startswith("opencv-")]


def settings_of_pip(listed: str) -> list[str]:
    """Names of the settings that an installation by pip follows, and that uv would pass over.

    Args:
        listed: by ``pip config list``: files and variables of the environment.
    """
    found = re.findall(r"(?m)^(?::env:|global|install|site|user)\.([\w-]+)=", listed)
    return sorted({name.replace("_", "-") for name in found} - {*NEEDLESS_FOR_UV})


def check_python_version(version: tuple[int, ...], executable: str) -> None:
    """Raise a SetupError if the Python version is too old."""
    if version[:2] < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        raise SetupError(
            f"Python {needed} or newer is needed, {executable} is "
            f"{'.'.join(map(str, version[:3]))}. Choose another: make PYTHON=/path/to/python3 ..."
        )


class Environment:
    """A virtual environment and the commands that fill it.

    Args:
        path: its folder; need not exist.
        uv: that installs in the place of pip, if any.
        run: ``subprocess.run``, or a stand-in for it.
        say: receives one line for each thing that is done.
    """

    def __init__(
        self,
        path: Path,
        *,
        uv: str | None = None,
        run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
        say: Callable[[str], None],
    ):
        self.path = path
        self.python = path / "bin" / "python"
        self.stamp = path / STAMP_NAME
        self._uv = uv
        self._run = run
        self._say = say

    # -- the environment itself -----------------------------------------------------------------

    def ensure_created(self) -> None:
        """Make the environment, or make it anew if it does not work.

        Raises:
            SetupError: it cannot be made.
        """
        if self._works("-m", "pip", "--version"):
            self._say(f"{self.path} is there, keep it")
            return
        if self._works("-c", "pass"):
            # Made by another tool without pip, which is then added; or interrupted while pip was
            # being put in, which ensurepip may take for complete.
            self._say(f"{self.path} has no pip, add it")
            self._works("-m", "ensurepip", "--upgrade")
            if self._works("-m", "pip", "--version"):
                return
        base = self.probe(sys.executable)
        share = base.has("torch", "torchvision")
        self._say(f"make {self.path} with {sys.executable}")
        if share:
            self._say(f"  which has {_describe(base)}: the environment uses these")
        for name, error in base.errors.items():
            self._say(f"  its {name} does not import and is not used ({error})")
        options = ["--clear"] + (["--system-site-packages"] if share else [])
        self._check(
            [sys.executable, "-m", "venv", *options, str(self.path)],
            "Could not make a virtual environment. On Debian and Ubuntu the module venv is a "
            "package of its own: apt install python3-venv.",
        )
        if share and sys.prefix != sys.base_prefix:
            # From inside a virtual environment --system-site-packages means the packages of the
            # Python below it; those of the environment itself are added here.
            self._share_packages_of_calling_environment()

    def _share_packages_of_calling_environment(self) -> None:
        folders = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
        lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
        (self.purelib() / SHARED_PTH_NAME).write_text("\n".join(lines) + "\n")

    def is_shared(self) -> bool:
        """Whether it sees the packages of the interpreter that it was made with."""
        config = self.path / "pyvenv.cfg"
        return config.is_file() and bool(
            re.search(r"(?im)^include-system-site-packages\s*=\s*true", config.read_text())
        )

    def purelib(self) -> Path:
        script = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        result = self._run([str(self.python), "-c", script], stdout=subprocess.PIPE, text=True)
        return Path(result.stdout.strip())

    def probe(self, python: str | None = None) -> Interpreter:
        """Import what matters in a process of its own, here or in another interpreter."""
        names = (*KEPT_TOGETHER, "detectron2", "cv2")
        result = self._run(
            [python or str(self.python), "-c", PROBE, *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if result.returncode != 0:
            # Killed by a signal, as a compiled module of another version may do.
            error = f"exit code {result.returncode}"
            return Interpreter(errors={"environment": error})
        return Interpreter(**json.loads(result.stdout.splitlines()[-1]))

    # -- what goes into it ----------------------------------------------------------------------

    def choose_installer(self) -> None:
        """Leave uv aside where it would install something else than pip."""
        if self._uv is None:
            return
        reason = ""
        if self.is_shared():
            # uv does not see the packages outside, and would install them again.
            reason = f"{self.path} uses packages of another environment"
        else:
            command = [str(self.python), "-m", "pip", "config", "list"]
            listed = self._run(command, stdout=subprocess.PIPE, text=True)
            settings = settings_of_pip(listed.stdout)
            if settings:
                reason = f"pip has settings here that uv does not read ({', '.join(settings)})"
        self._say(f"pip installs, and not uv: {reason}" if reason else f"{self._uv} installs")
        if reason:
            self._uv = None

    def install_packages(self, plan: Plan) -> None:
        """Install what the plan lacks, from the pinned files or around what is kept."""
        for name in remove_unfinished(self.purelib()):
            self._say(f"{name} was not installed completely, do it again")
        # setuptools first: a few run-time packages exist as source only, and building them with
        # the pinned version, not with the newest of the day, keeps the result the same.
        runtime = read_requirements(REQUIREMENTS / ("runtime.txt" if plan.pinned else "runtime.in"))
        self._install([line for line in runtime if line.startswith("setuptools")], "setuptools")
        requirements = read_requirements(REQUIREMENTS / "torch.txt") if plan.torch else []
        requirements += runtime if plan.opencv else without_opencv(runtime)
        requirements += read_requirements(REQUIREMENTS / "dev.txt")
        if plan.torch:
            self._say("install PyTorch and the other packages (some minutes, several GB)")
        else:
            self._say("install the packages that are missing")
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder, "kept.txt")
            constraints.write_text("\n".join(plan.constraints) + "\n")
            needed = Path(folder, "needed.txt")
            needed.write_text("\n".join(requirements) + "\n")
            self._install(
                ["--no-build-isolation", "--constraint", str(constraints), "-r", str(needed)],
                "the packages of requirements/",
            )

    def install_alone(self) -> None:
        """Install some packages without what they require; their file says why."""
        requirements = read_requirements(REQUIREMENTS / "alone.txt")
        self._install(["--no-deps", *requirements], "the packages of requirements/alone.txt")

    def install_detectron2(self) -> None:
        """Install the Detectron2 wheel, whatever the Python version, checked by its hash.

        The wheel goes to a folder beside its destination first. Its package ``detectron2`` is
        moved last and in one step, so that it is either whole or absent.
        """
        self._say("install Detectron2")
        with tempfile.TemporaryDirectory(dir=self.path) as folder:
            self._install(
                ["--no-deps", "--only-binary=:all:", "--python-version", "3.10"]
                + ["--require-hashes", "-r", str(REQUIREMENTS / "detectron2.txt")]
                + ["--target", folder],
                "Detectron2",
            )
            install_unpacked_detectron2(Path(folder), self.purelib())

    def install_project(self) -> None:
        self._say("install this project (editable)")
        self._install(
            ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)], "this project"
        )

    def _install(self, arguments: list[str], what: str) -> None:
        """Install by uv or pip, whose options these are."""
        quiet = [] if sys.stdout.isatty() else ["--quiet"]
        if self._uv is not None:
            command = [self._uv, "pip", "install", "--python", str(self.python), *quiet]
            result = self._run([*command, *arguments], stdin=subprocess.DEVNULL)
            if result.returncode == 0:
                return
            self._say(f"uv could not install {what} (exit code {result.returncode}), pip tries it")
            self._uv = None
        # Detectron2's wheel declares numpy<2 and black, and needs neither: no warning about that.
        options = ["--disable-pip-version-check", "--no-input", "--no-warn-conflicts", *quiet]
        log = self.path / "pip.log"
        self._check(
            [str(self.python), "-m", "pip", "install", *options, "--log", str(log), *arguments],
            f"pip could not install {what}; its message is above, the details are in {log}. If "
            "PyPI cannot be reached from here, docs/dependencies.md says how to install without a "
            "network.",
        )

    # -- running --------------------------------------------------------------------------------

    def _works(self, *arguments: str) -> bool:
        command = [str(self.python), *arguments]
        try:
            result = self._run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError:
            return False
        return result.returncode == 0

    def _check(self, command: list[str], message: str) -> None:
        result = self._run(command, stdin=subprocess.DEVNULL)
        if result.returncode != 0:
            raise SetupError(f"{message}\n(exit code {result.returncode}: {' '.join(command)})")


def remove_unfinished(site_packages: Path) -> list[str]:
    """Make pip and uv forget packages that they were killed over, and take for installed.

    pip writes the file RECORD of a package last; uv writes INSTALLER after all that the wheel has,
    RECORD included.

    Returns:
        Names and versions of these packages.
    """
    unfinished = [
        folder
        for folder in sorted(site_packages.glob("*.dist-info"))
        if not all((folder / name).is_file() for name in ("RECORD", "INSTALLER"))
    ]
    for folder in unfinished:
        shutil.rmtree(folder)
    return [folder.name[: -len(".dist-info")] for folder in unfinished]


def install_unpacked_detectron2(unpacked: Path, site_packages: Path) -> None:
    """Move ``detectron2`` and its metadata to where packages live, in place of a broken one.

    The wheel's second top-level package, ``tools``, holds Detectron2's own scripts. It is left
    out, for its name is too general to be importable everywhere.

    Raises:
        SetupError: there is no ``detectron2`` in the unpacked wheel.
    """
    if not (unpacked / "detectron2").is_dir():
        raise SetupError(f"the wheel in {REQUIREMENTS / 'detectron2.txt'} holds no detectron2")
    for source in (*unpacked.glob("*.dist-info"), unpacked / "detectron2"):
        target = site_packages / source.name
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        os.replace(source, target)


def set_up(environment: Environment, *, say: Callable[[str], None]) -> None:
    """Bring the environment to the state that the Makefile's targets need.

    Raises:
        SetupError: a step failed. What was done stays, and the next call goes on from there.
    """
    environment.stamp.unlink(missing_ok=True)
    environment.ensure_created()
    plan = make_plan(environment.probe(), shared=environment.is_shared())
    environment.choose_installer()
    environment.install_packages(plan)
    environment.install_alone()
    # Asked again: a Detectron2 that was there may have lacked no more than PyTorch or fvcore.
    if environment.probe().has("detectron2"):
        say("Detectron2 is there, keep it")
    else:
        environment.install_detectron2()
    environment.install_project()

    present = environment.probe()
    if not present.has("torch", "torchvision", "detectron2", "cv2"):
        errors = "; ".join(f"{name}: {error}" for name, error in present.errors.items())
        raise SetupError(
            f"{environment.path} does not work ({errors or 'packages are missing'}). "
            f"Remove that folder and try again."
        )
    environment.stamp.write_text(f"{_describe(present)}\n")
    say(f"{environment.path} is ready: {_describe(present)}")


def _describe(interpreter: Interpreter) -> str:
    return ", ".join(f"{name} {version}" for name, version in interpreter.versions.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        print(f"set-up: {line}", flush=True)

    try:
        check_python_version(tuple(sys.version_info[:3]), sys.executable)
        environment = Environment(arguments.venv.absolute(), uv=shutil.which("uv"), say=say)
        set_up(environment, say=say)
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted; the next run completes it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
