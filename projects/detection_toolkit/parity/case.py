"""Reading a case file: one ``.npz`` with weights, inputs and the values they must lead to."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import Execution

__all__ = ["Case", "CaseError", "Inputs", "Settings"]

WEIGHT = "weight/"


class CaseError(UserError):
    """A case file is damaged, of an unknown layout, or lacks an array; the message says which."""


@dataclass(frozen=True)
class Settings:
    """How a case is computed and compared."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    atol: float = 1e-4
    """Largest absolute difference of logits, features and filters."""
    autocast: torch.dtype | None = None
    """Half-precision type of autocast; None for none."""
    last_bit_seed: int | None = None
    """Change every weight and feature by at most one unit in the last place of float32, drawn
    with this seed: shows how far rounding alone moves the results. None: leave them."""
    execution: Execution = field(default_factory=Execution)
    """How the detector computes."""
    replace_parts: Callable[[nn.Module], nn.Module] | None = None
    """Makes another implementation, with the same parameters, of decoder and criterion."""


class Case:
    """The arrays of one file."""

    def __init__(self, path: str | Path):
        """
        Raises:
            FileNotFoundError: no such file.
            CaseError: it is not an ``.npz`` of plain arrays.
        """
        self.path = Path(path)
        self.name = self.path.stem
        if not self.path.is_file():
            raise FileNotFoundError(f"no such case file: {self.path}")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                self._arrays = {name: archive[name] for name in archive.files}
        except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            raise CaseError(f"{self.path} is no readable .npz of plain arrays: {error}") from error

    @property
    def names(self) -> frozenset[str]:
        """Names of all arrays."""
        return frozenset(self._arrays)

    def array(self, name: str) -> np.ndarray:
        """One array.

        Raises:
            CaseError: the file has none of this name.
        """
        try:
            return self._arrays[name]
        except KeyError:
            raise CaseError(f"{self.path} lacks the array {name!r}") from None

    def json(self, name: str = "config") -> dict[str, Any]:
        """A JSON document kept as bytes.

        Raises:
            CaseError: missing or not JSON.
        """
        try:
            document = json.loads(bytes(self.array(name)).decode())
        except (TypeError, ValueError) as error:
            raise CaseError(f"{name!r} in {self.path} is no JSON document: {error}") from error
        if not isinstance(document, dict):
            raise CaseError(f"{name!r} in {self.path} is no JSON object")
        return document

    @property
    def summary(self) -> Summary:
        """The ``summary`` block of the config."""
        config = self.json()
        if "summary" not in config:
            raise CaseError(f"the config in {self.path} lacks its block 'summary'")
        return Summary(config["summary"], self.path)

    def below(self, prefix: str) -> list[str]:
        """Names that start with ``prefix``, in the file's order."""
        return [name for name in self._arrays if name.startswith(prefix)]


class Summary:
    """Sizes and switches of the network; reading one that is not there is a clear error."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        self._values = values
        self._path = path

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        try:
            return self._values[key]
        except KeyError:
            raise CaseError(f"the config summary in {self._path} lacks {key!r}") from None


class Inputs:
    """A case's inputs as tensors of the wanted type on the wanted device."""

    def __init__(self, case: Case, settings: Settings):
        self._case = case
        self._settings = settings
        seed = settings.last_bit_seed
        self._generator = None if seed is None else np.random.default_rng(seed)

    def tensor(self, name: str, *, exact: bool = False) -> Tensor:
        """Floating point arrays in the wanted type; others as they are.

        Args:
            name: of the array.
            exact: never change the last bit (coordinates of objects, say).
        """
        array = self._case.array(name)
        if array.dtype.kind != "f":
            return torch.from_numpy(array).to(self._settings.device)
        if array.dtype == np.float16:  # a shorter way to keep numbers that have so few digits
            array = array.astype(np.float32)
        if self._generator is not None and not exact:
            direction = self._generator.integers(-1, 2, size=array.shape).astype(array.dtype)
            array = np.where(
                direction == 0, array, np.nextafter(array, direction * np.finfo(array.dtype).max)
            ).astype(array.dtype)
        return torch.from_numpy(array).to(self._settings.device, self._settings.dtype)

    def weights(self) -> dict[str, Tensor]:
        """All weights by their official names."""
        return {name[len(WEIGHT) :]: self.tensor(name) for name in self._case.below(WEIGHT)}
