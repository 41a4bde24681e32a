"""Wheel, sdist and editable install, and the wheel at work in another folder."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import trove_classifiers
from coco_files import write_dataset
from format_files import make_splits, write_coco, write_yolo
from small_runs import SMALL_MODEL, data_overrides

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "stageinteractor/shapes_tiny.py"
NOT_SOURCES = (
    *(".venv", ".git", ".hypothesis", ".*_cache", "__pycache__"),
    *("*.egg-info", "build", "dist", "output", "datasets"),
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(source: Path, target: Path, hook: str) -> Path:
    """Call a hook of the build backend, as pip does, and return the file that it made."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"from hatchling import build; print(build.{hook}({str(target)!r}))"
    return target / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


def shipped_files() -> set[str]:
    """What a wheel must carry, as names inside the package's folder."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in ("configs", "checkpoints")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout: a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return copy


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    for left in ("projects/stageinteractor.egg-info/PKG-INFO", "configs/__pycache__/a.pyc"):
        (source / left).parent.mkdir(exist_ok=True)
        (source / left).touch()
    return build(source, source / "dist", "build_wheel")


def test_the_wheel_carries_configs_and_checkpoints_and_nothing_left_from_before(wheel):
    prefix = "detection_toolkit/"
    carried = {
        name[len(prefix) :]
        for name in names_in_wheel(wheel)
        if name.startswith((f"{prefix}configs/", f"{prefix}checkpoints/"))
    }
    assert "configs/stageinteractor/shapes_tiny.py" in carried
    assert carried == shipped_files()


def test_the_wheel_carries_every_project_and_only_projects(wheel):
    packages = {
        path.parent.relative_to(ROOT / "projects").as_posix()
        for path in (ROOT / "projects").rglob("__init__.py")
    }
    names = names_in_wheel(wheel)
    assert {f"{package}/__init__.py" for package in packages} <= names
    assert "detection_toolkit/web/page.css" in names
    assert {f"{name}/py.typed" for name in packages if "/" not in name} <= names
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {package for package in packages if "/" not in package}


def test_the_wheel_requires_nothing_that_could_replace_pytorch_or_detectron2(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    required = {re.match(r"[\w.-]+", line).group().lower() for line in plain}
    assert not {name for name in required if re.search("torch|detectron2|opencv", name)}
    assert {"omegaconf", "fvcore", "pycocotools", "scipy"} <= required
    (omegaconf,) = [line for line in plain if line.startswith("omegaconf")]
    assert "<2.4" in omegaconf and ">=2.1" in omegaconf
    assert metadata["Version"] == __import__("stageinteractor").__version__


def test_an_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    sdist = build(source, tmp_path / "sdist", "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    unpacked = tmp_path / sdist.name[: -len(".tar.gz")]
    assert (unpacked / "tests" / "packaging" / Path(__file__).name).is_file()
    again = build(unpacked, tmp_path / "wheel", "build_wheel")
    assert names_in_wheel(again) == names_in_wheel(wheel)


def test_the_metadata_are_ready_for_an_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        names = archive.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# StageInteractor")
    assert metadata["Requires-Python"] == ">=3.10" and metadata["Keywords"]
    assert set(metadata.get_all("Classifier")) <= trove_classifiers.classifiers


def test_setup_py_says_where_it_went():
    done = subprocess.run(
        [sys.executable, "setup.py", "install"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("pip install .")


def test_an_editable_install_refers_to_the_checkout_and_copies_nothing(source, tmp_path):
    editable = build(source, tmp_path, "build_editable")
    with zipfile.ZipFile(editable) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [name.endswith(".pth") for name in names] == [True], names
        assert archive.read(names[0]).decode().strip() == str(source / "projects")


def test_an_installed_wheel_finds_its_configs_from_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--no-index", "--target", str(site), str(wheel)),
        cwd=elsewhere,
    )
    code = """
import stageinteractor
from detection_toolkit.config import find_config_file
from detectron2.config import instantiate
print(stageinteractor.__file__)
for name in ("stageinteractor/shapes_tiny.py", "stageinteractor/stageinteractor_r50_100q_1x.py"):
    print(find_config_file(name))
cfg = stageinteractor.get_config("stageinteractor/shapes_tiny.py")
print(type(instantiate(cfg.model)).__module__)
"""
    output = run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(site)).splitlines()
    module, *configs, detector = output[-4:]
    assert module == str(site / "stageinteractor" / "__init__.py")
    assert configs == [
        str(site / "detection_toolkit" / "configs" / "stageinteractor" / name)
        for name in ("shapes_tiny.py", "stageinteractor_r50_100q_1x.py")
    ]
    assert detector == "stageinteractor.detector"


# -- a clean environment --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(source, tmp_path_factory) -> Path:
    """A virtual environment with the wheel of the sdist, and nothing of the checkout.

    PyTorch, Detectron2 and the other requirements are those of this process: added to the path, not
    installed, so that no network is needed.
    """
    folder = tmp_path_factory.mktemp("clean")
    sdist = build(source, folder / "sdist", "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    wheel = build(folder / sdist.name[: -len(".tar.gz")], folder / "wheel", "build_wheel")
    run(sys.executable, "-m", "venv", str(folder / "venv"), cwd=folder)
    python = str(folder / "venv" / "bin" / "python")
    purelib = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(run(python, "-c", purelib, cwd=folder).strip())
    # Paths alone: a .pth file within them, as an editable install has, is not read.
    others = [p for p in sys.path if os.path.isdir(p) and not Path(p).is_relative_to(ROOT)]
    installed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "requirements.pth").write_text("\n".join([*others, *installed]) + "\n")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    run(python, *install, cwd=folder, PYTHONPATH="")
    return folder


@pytest.fixture
def call(clean, tmp_path):
    """Runs a program of the environment in a folder of the test."""

    def run_program(command: str, *arguments: str) -> str:
        quiet = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return run(str(clean / "venv" / "bin" / command), *arguments, cwd=tmp_path, **quiet)

    return run_program


@pytest.mark.slow
def test_a_yolo_folder_and_coco_files_of_the_same_images_have_the_same_losses(call, tmp_path):
    splits = make_splits()
    write_yolo(tmp_path / "yolo", splits)
    write_coco(tmp_path / "coco", splits)
    settings = [*SMALL_MODEL, "train.device=cpu", "train.max_iter=2", "train.eval_period=0"]
    settings += ["train.seed=1", "train.log_period=1", "dataloader.train.total_batch_size=2"]
    losses = {}
    for name in ("yolo", "coco"):
        assert "Ready to train" in call("stageinteractor", "check", "--data", name)
        words = ("--config-file", CONFIG, "--data", name, f"train.output_dir={name}_run")
        call("stageinteractor", "train", *words, *settings)
        lines = (tmp_path / f"{name}_run" / "metrics.json").read_text().splitlines()
        steps = [step for step in map(json.loads, lines) if "total_loss" in step]
        losses[name] = [{k: v for k, v in s.items() if "loss" in k} for s in steps]
    assert len(losses["coco"]) == 2 and len(losses["coco"][0]) > 3
    assert losses["yolo"] == losses["coco"]  # to the last digit


@pytest.mark.slow
def test_the_command_of_a_clean_environment_works_from_any_folder(call, clean, tmp_path):
    json_file, images = write_dataset(tmp_path / "my", num_images=5)
    where = "import detection_toolkit; print(detection_toolkit.__file__)"
    assert call("python", "-c", where).startswith(str(clean / "venv"))
    assert CONFIG in call("stageinteractor", "configs").splitlines()
    assert "Ready to train" in call("stageinteractor", "check", json_file, images)
    settings = [*SMALL_MODEL, *data_overrides(json_file, images), "train.device=cpu"]
    settings += ["train.max_iter=2", "train.output_dir=run", "train.eval_period=0"]
    printed = call("stageinteractor", "train", "--config-file", CONFIG, *settings)
    assert "stageinteractor report run" in printed
    trained = ("--config-file", "run/config.yaml")
    call("stageinteractor", "eval", *trained, "train.stage_evaluation=true")
    assert "report.html" in call("stageinteractor", "report", "run", "--images", "1")
    call("stageinteractor", "predict", *trained, "--input", images, "--output", "drawn")
    assert len(list((tmp_path / "drawn").iterdir())) == 5
    export = ("--format", "torch_export", "--output", "model.pt2")
    assert "wrote model.pt2" in call("stageinteractor", "export", *trained, *export)
