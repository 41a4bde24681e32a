"""What is checked and measured: a YAML file as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from ...config import apply_overrides, get_config
from ...errors import UserError
from ..environment import ROOT

__all__ = ["GpuPlan", "NamedConfig"]


@dataclass(frozen=True)
class NamedConfig:
    """A config and the changes to it."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    decoder: bool = True
    """Whether its decoder is timed by itself, too: its maps are those of four strides from 4 on."""
    training_batches: tuple[int, ...] = ()
    """In the place of the plan's."""

    def load(self, *overrides: str) -> DictConfig:
        """The config with its changes, and further ones."""
        return apply_overrides(get_config(self.config), [*self.overrides, *overrides])


@dataclass(frozen=True)
class GpuPlan:
    """All that the stages need to know."""

    cases: tuple[str, ...]
    """Numeric cases: files, or folders of them, from the root of the checkout."""
    models: tuple[NamedConfig, ...]
    """Whose forms of computing are compared and timed."""
    compared_size: tuple[int, int]
    """Height and width of the images of that comparison."""
    image_size: tuple[int, int]
    """Of the timings."""
    inference_batches: tuple[int, ...]
    training_batches: tuple[int, ...]
    matching_batch: int
    rounds: int
    """Calls of each timed function that count."""
    forms: tuple[str, ...]
    """Names of :data:`~.forms.FORMS`, the first of which is the one that others are compared to."""
    training: NamedConfig
    """Trained from scratch and evaluated."""
    training_steps: int
    """At most."""
    loop: NamedConfig
    """Whose steps are timed with their loader."""
    loop_steps: int
    repeated: tuple[NamedConfig, ...]
    """Trained twice each, to equal weights."""
    repeated_steps: int
    exported: NamedConfig
    drawn_images: int = 0
    """So many shapes are drawn in the place of the configs' data; 0: the data are the configs'."""

    @classmethod
    def read(cls, path: Path) -> GpuPlan:
        """
        Raises:
            UserError: keys are missing or unknown.
            FileNotFoundError: no such file.
        """
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, Mapping):
            raise UserError(f"{path} is no plan: a plan is a group of keys")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and name not in values
        )
        if unknown or missing:
            raise UserError(f"{path}: unknown keys {unknown}, missing keys {missing}")
        plan: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        for key in ("models", "repeated"):
            plan[key] = tuple(_named(path, name, v) for name, v in values[key].items())
        for name in ("training", "loop", "exported"):
            plan[name] = _named(path, name, values[name])
        return cls(**plan)

    def case_files(self) -> list[Path]:
        """
        Raises:
            UserError: a file or folder is not there, or there is no case in it.
        """
        files: list[Path] = []
        for name in self.cases:
            path = ROOT / name
            found = sorted(path.glob("*.npz")) if path.is_dir() else [path]
            if not found or not all(file.is_file() for file in found):
                raise UserError(f"no numeric cases at {path}")
            files += found
        return files


def _named(path: Path, name: str, values: Any) -> NamedConfig:
    known = {field.name for field in dataclasses.fields(NamedConfig)} - {"name"}
    if not isinstance(values, Mapping) or not {"config"} <= set(values) <= known:
        raise UserError(
            f"{path}: {name} needs a config, and may have {', '.join(sorted(known - {'config'}))} "
            "beside it"
        )
    return NamedConfig(
        name, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )
