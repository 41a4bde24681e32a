"""What runs any query-based detector: data, engine, evaluation, checkpoints, pictures, export.

Importing the package checks that Detectron2 is there and says how to get it when it is not; it
loads neither that nor PyTorch. The parts live in their own modules (``detection_toolkit.modeling``,
``detection_toolkit.data``, ...), which a config or a script imports as it needs them. A detector is
a package of its own beside this one.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from .threads import wait_briefly

__version__ = "0.1.0"
__all__ = ["__version__", "get_config", "require_detectron2"]

_HOW_TO_INSTALL = """\
this project needs {missing}, which this Python environment does not have.
Install PyTorch first (https://pytorch.org/get-started/locally), then Detectron2 by one of these:
  from git, with its compiled operators (a compiler is needed):
      pip install --no-build-isolation "git+https://github.com/facebookresearch/detectron2.git"
  as a wheel from PyPI, without compiled operators (none is needed here; the wheel is tagged for
  Python 3.10 but holds Python files only, so it is put in place whatever the version):
      pip install --no-deps --only-binary=:all: --python-version 3.10 sal-detectron2==0.7.2 \\
          --target "$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
  without a network:
      the same command with --no-index --find-links <folder with the wheel>
In a clone of the repository, `make demo` or `make test` sets all of this up in .venv.
docs/dependencies.md tells more about each way."""


def _check_installed() -> None:
    """Say how to install PyTorch and Detectron2 where they are not there, without loading them.

    Raises:
        ImportError: one of them is not installed.
    """
    for name, missing in (("torch", "PyTorch and Detectron2"), ("detectron2", "Detectron2")):
        if find_spec(name) is None:
            raise ImportError(_HOW_TO_INSTALL.format(missing=missing))


def require_detectron2() -> None:
    """Import Detectron2, or say why that fails.

    Raises:
        ImportError: it is installed and does not import; the original error is the cause.
    """
    try:
        import detectron2  # noqa: F401
    except Exception as error:
        # Not only ImportError: a compiled operator or library of another version may raise
        # OSError, AttributeError and more while the modules are executed.
        raise _broken_detectron2(error) from error


def _broken_detectron2(error: Exception) -> ImportError:
    return ImportError(
        "Detectron2 is installed, but importing it failed with "
        f"{type(error).__name__}: {error}\n"
        "Its own dependencies, or a compiled part built for another PyTorch, are the usual "
        "reasons; `python -c 'import detectron2'` shows the same error."
    )


wait_briefly()
_check_installed()


def __getattr__(name: str) -> Any:
    # Lazy, so that `import detection_toolkit` stays light and imports none of its packages.
    if name == "get_config":
        require_detectron2()
        from .config import get_config

        return get_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
