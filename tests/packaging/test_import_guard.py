"""``import detection_toolkit`` with Detectron2 there, absent, and broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import patience
import pytest

PROJECTS = Path(__file__).resolve().parents[2] / "projects"

# Makes the named modules look as if they were not installed.
BLOCK = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


def run_python(code: str, *folders: Path) -> subprocess.CompletedProcess:
    """Run code that finds packages in these folders first, then in the project."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, PROJECTS]))}
    return patience.run([sys.executable, "-c", code], env=environment)


def import_without(*names: str) -> str:
    """Standard error of ``import detection_toolkit`` where the named modules are missing."""
    block = BLOCK.format(names=set(names))
    result = run_python(block + "import detection_toolkit")
    assert result.returncode == 1
    return result.stderr


def make_detectron2(folder: Path, source: str) -> None:
    """Write a Detectron2 of this source."""
    package = folder / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text(source)


def test_without_detectron2_one_error_tells_every_way_to_install_it():
    stderr = import_without("detectron2")
    assert stderr.count("Traceback") == 1
    assert "ImportError: this project needs Detectron2," in stderr
    assert "git+https://github.com/facebookresearch/detectron2" in stderr
    assert "sal-detectron2" in stderr
    assert "--no-index" in stderr
    assert "docs/dependencies.md" in stderr


def test_without_torch_the_error_names_it_too():
    stderr = import_without("torch")
    assert stderr.count("Traceback") == 1
    assert "ImportError: this project needs PyTorch and Detectron2," in stderr


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import missing_dependency_of_detectron2", "ModuleNotFoundError"),
        ("raise ImportError('_C.so: undefined symbol')", "ImportError: _C.so: undefined symbol"),
        ("raise OSError('libcudart.so.11: cannot open')", "OSError: libcudart.so.11"),
        ("from torch_of_another_version.x import y", "torch_of_another_version"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        "from detection_toolkit import get_config",
        "from detection_toolkit.engine import Trainer",
        "from detection_toolkit.engine import user_errors\nwith user_errors(): pass",
    ],
)
def test_a_broken_detectron2_is_not_called_absent(tmp_path, source, cause, use):
    make_detectron2(tmp_path, source)
    result = run_python(use, tmp_path)
    assert result.returncode == 1
    stderr = result.stderr
    assert "ImportError: Detectron2 is installed, but importing it failed" in stderr
    assert cause in stderr.split("The above exception was the direct cause")[0]
    assert cause in stderr.splitlines()[-2], "the message itself names the cause"
    assert "needs Detectron2" not in stderr


def test_importing_the_package_imports_none_of_its_packages(tmp_path):
    make_detectron2(tmp_path, "")
    result = run_python(
        "import sys, detection_toolkit\n"
        "print(sorted(name for name in sys.modules if name.startswith('detection_toolkit')))",
        tmp_path,
    )
    assert result.stdout.strip() == "['detection_toolkit', 'detection_toolkit.threads']"


def test_get_config_is_reachable_from_the_package():
    import detection_toolkit
    from detection_toolkit.config import get_config

    assert detection_toolkit.get_config is get_config
    with pytest.raises(AttributeError, match="no attribute 'get_confg'"):
        detection_toolkit.get_confg  # noqa: B018
