"""The checkpoint that comes with the project: the detector of the built-in shapes data."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SHIPPED_CONFIG", "is_shipped_config", "shipped_checkpoint"]

SHIPPED_CONFIG = "stageinteractor/shapes_tiny.py"

_NAME = "shapes_tiny.pth"


def shipped_checkpoint() -> str:
    """Path of the weights that belong to ``stageinteractor/shapes_tiny.py``.

    A checkout keeps them in ``checkpoints/``, an installed package in
    ``stageinteractor/checkpoints/``.

    Raises:
        FileNotFoundError: neither has them; the message says how to make them.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = [
        package.parents[1] / "checkpoints" / _NAME,  # <checkout>/projects/stageinteractor
        package / "checkpoints" / _NAME,
    ]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    raise FileNotFoundError(
        f"no {_NAME} in {' or '.join(str(c.parent) for c in candidates)}: "
        "`make shapes-checkpoint` trains it, or name other weights with train.init_checkpoint=FILE"
    )


def is_shipped_config(config_file: str) -> bool:
    """Whether a config, by its path or packaged name, is the one of the shipped checkpoint."""
    return Path(config_file).parts[-2:] == Path(SHIPPED_CONFIG).parts
