"""Wheel, sdist and editable install, and the wheel at work in another folder."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
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
    stale = source / "build" / "lib" / "detection_toolkit" / "configs" / "removed_since.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
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
