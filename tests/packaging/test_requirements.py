"""The requirement files agree with each other, with pyproject.toml and their documentation."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
PYTHON_VERSIONS = ("3.10", "3.11", "3.12", "3.13")


def read(name: str) -> list[Requirement]:
    lines = (
        re.split("#|--hash", line)[0].strip()
        for line in (REQUIREMENTS / name).read_text().splitlines()
    )
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def read_for(name: str, python: str) -> list[Requirement]:
    """The requirements that count on Linux with this Python version."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    return [
        requirement
        for requirement in read(name)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]


def pins(name: str, python: str) -> dict[str, str]:
    """Distribution -> pinned version, on Linux with this Python version."""
    result: dict[str, str] = {}
    for requirement in read_for(name, python):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, requirement
        key = canonicalize_name(requirement.name)
        assert key not in result, f"{name} pins {key} twice on Python {python}"
        result[key] = specifier.version
    return result


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("python", PYTHON_VERSIONS)
@pytest.mark.parametrize("kind", ["runtime", "dev"])
def test_every_direct_requirement_has_a_pin_that_satisfies_it(kind, python):
    pinned = pins(f"{kind}.txt", python)
    for requirement in read_for(f"{kind}.in", python):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("python", PYTHON_VERSIONS)
def test_files_that_are_installed_together_agree(python):
    merged: dict[str, str] = {}
    for name in ("torch.txt", "runtime.txt", "dev.txt", "detectron2.txt", "alone.txt"):
        for key, version in pins(name, python).items():
            assert merged.setdefault(key, version) == version, f"{name}: {key}"
    assert {"torch", "torchvision", "sal-detectron2"} <= set(merged)
    assert [key for key in merged if key.startswith("opencv")] == ["opencv-python-headless"]


def test_the_project_requires_what_the_runtime_file_lists_but_for_two():
    runtime = {canonicalize_name(line.name): line.specifier for line in read("runtime.in")}
    required = {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in map(Requirement, PROJECT["dependencies"])
    }
    # An environment may have another distribution of OpenCV, and Detectron2 needs an old setuptools
    # for its model zoo alone: neither is worth replacing what a user has.
    assert required == {
        name: specifier
        for name, specifier in runtime.items()
        if name not in {"opencv-python-headless", "setuptools"}
    }


def test_extras_agree_with_the_requirement_files():
    # Not in dev.in: what an environment has in another way, and MLflow, which moves versions.
    names = [name for name in EXTRAS if name not in ("torch", "opencv", "mlflow")]
    listed = {Requirement(line).name for extra in names for line in EXTRAS[extra]}
    alone = {line.name for line in read("alone.txt")}  # installed without dependencies
    assert listed - alone == {line.name for line in read("dev.in")}
    assert "trackers" in alone - listed, "an extra of it brings opencv-python"
    for python in PYTHON_VERSIONS:
        pinned = pins("torch.txt", python)
        for requirement in map(Requirement, EXTRAS["torch"]):
            assert requirement.specifier.contains(pinned[requirement.name])


def test_the_project_builds_with_what_is_pinned():
    (text,) = PYPROJECT["build-system"]["requires"]
    assert text in EXTRAS["dev"]  # make builds without isolation
    assert Requirement(text).specifier.contains(pins("dev.txt", "3.11")["hatchling"])


def test_one_version_of_python_is_the_floor_of_everything():
    floor = PYTHON_VERSIONS[0]
    assert PROJECT["requires-python"] == f">={floor}"
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert tuple(named) == PYTHON_VERSIONS
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + floor.replace(".", "")
    assert f"--python-version {floor} " in (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in ("README.md", "docs/getting_started.md", "docs/faq.md"):
        assert f"{floor} or newer" in (ROOT / page).read_text(encoding="utf-8"), page


def test_every_detector_of_the_checkout_is_found_in_a_wheel_too():
    """By an entry point, and by no other name."""
    folders = {path.parent.name for path in (ROOT / "projects").glob("*/__init__.py")}
    listed = PROJECT["entry-points"]["detection_toolkit.projects"]
    assert listed == {name: name for name in folders - {"detection_toolkit"}}


def test_detectron2_is_pinned_by_hash_and_the_error_message_names_the_same_version():
    (requirement,) = read("detectron2.txt")
    text = (REQUIREMENTS / "detectron2.txt").read_text()
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", text)) == 1
    named = f"{requirement.name}{requirement.specifier}"
    assert named in (ROOT / "projects" / "detection_toolkit" / "__init__.py").read_text()


def test_the_documentation_has_the_pin_and_a_reason_for_every_direct_dependency():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    row = r"^\| `([\w.-]+)[^|]*\| ([^ |]+) \|(?: `([\w-]+)` \|)? ([^|]+) \|$"
    found = re.findall(row, text, flags=re.M)
    rows = {name: (version, reason) for name, version, _, reason in found}
    for name, _, extra, _ in found:
        if extra:
            assert name in {Requirement(line).name for line in EXTRAS[extra]}
    for direct, pinned in {
        "torch.txt": "torch.txt",
        "detectron2.txt": "detectron2.txt",
        "runtime.in": "runtime.txt",
        "dev.in": "dev.txt",
        "alone.txt": "alone.txt",
    }.items():
        for requirement in read(direct):
            version, reason = rows[requirement.name]
            assert version == pins(pinned, "3.11")[canonicalize_name(requirement.name)]
            assert len(reason) > 10, requirement.name
