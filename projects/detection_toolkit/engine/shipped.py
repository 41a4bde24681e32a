"""The checkpoint that comes with the project: the detector of the built-in shapes data.

Which one that is says ``shipped.json`` beside it: the config, by its name among the packaged ones,
the file of its weights, and the config by which data of one's own are trained on from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

__all__ = ["config_for_own_data", "is_shipped_config", "shipped_checkpoint", "shipped_config"]

_TABLE = "shipped.json"


class _Entry(NamedTuple):
    """Of ``shipped.json``."""

    config: str
    weights: str
    config_for_own_data: str


def shipped_config() -> str:
    """Name of the config that the shipped checkpoint belongs to.

    Raises:
        FileNotFoundError: no ``shipped.json``.
    """
    return _entry().config


def config_for_own_data() -> str:
    """Name of the config for data of one's own, whose detector begins from the shipped weights.

    Raises:
        FileNotFoundError: no ``shipped.json``.
    """
    return _entry().config_for_own_data


def shipped_checkpoint() -> str:
    """Path of the weights that belong to :func:`shipped_config`.

    A checkout keeps them in ``checkpoints/``, an installed package in
    ``detection_toolkit/checkpoints/``.

    Raises:
        FileNotFoundError: neither has them; the message says how to make them.
    """
    name = _entry().weights
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
    return entry is not None and Path(config_file).parts[-2:] == Path(entry.config).parts


def _folders() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    # <checkout>/projects/detection_toolkit; in a wheel the package has the folder itself.
    return [package.parents[1] / "checkpoints", package / "checkpoints"]


def _shown() -> str:
    return " or ".join(str(folder) for folder in _folders())


def _entry() -> _Entry:
    entry = _find_entry()
    if entry is None:
        raise FileNotFoundError(
            f"no {_TABLE} in {_shown()}, which names the config of the shipped checkpoint: restore "
            "it from the repository"
        )
    return entry


def _find_entry() -> _Entry | None:
    for folder in _folders():
        path = folder / _TABLE
        if path.is_file():
            return _Entry(**json.loads(path.read_text(encoding="utf-8")))
    return None
