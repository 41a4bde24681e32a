"""The checkpoint that comes with the project: the detector of the built-in shapes data.

Which one that is says ``shipped.json`` beside it: the config, by its name among the packaged ones,
and the file of its weights.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["is_shipped_config", "shipped_checkpoint", "shipped_config"]

_TABLE = "shipped.json"


def shipped_config() -> str:
    """Name of the config that the shipped checkpoint belongs to.

    Raises:
        FileNotFoundError: no ``shipped.json``.
    """
    return _entry()[0]


def shipped_checkpoint() -> str:
    """Path of the weights that belong to :func:`shipped_config`.

    A checkout keeps them in ``checkpoints/``, an installed package in
    ``detection_toolkit/checkpoints/``.

    Raises:
        FileNotFoundError: neither has them; the message says how to make them.
    """
    name = _entry()[1]
    for folder in _folders():
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(
        f"no {name} in {_shown()}: `make shapes-checkpoint` trains it, or name other weights with "
        "train.init_checkpoint=FILE"
    )


def is_shipped_config(config_file: str) -> bool:
    """Whether a config, by its path or packaged name, is the one of the shipped checkpoint."""
    entry = _find_entry()
    return entry is not None and Path(config_file).parts[-2:] == Path(entry[0]).parts


def _folders() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    # <checkout>/projects/detection_toolkit; in a wheel the package has the folder itself.
    return [package.parents[1] / "checkpoints", package / "checkpoints"]


def _shown() -> str:
    return " or ".join(str(folder) for folder in _folders())


def _entry() -> tuple[str, str]:
    entry = _find_entry()
    if entry is None:
        raise FileNotFoundError(
            f"no {_TABLE} in {_shown()}, which names the config of the shipped checkpoint: restore "
            "it from the repository"
        )
    return entry


def _find_entry() -> tuple[str, str] | None:
    """Config and weights."""
    for folder in _folders():
        path = folder / _TABLE
        if path.is_file():
            ((config, weights),) = json.loads(path.read_text(encoding="utf-8")).items()
            return config, weights
    return None
