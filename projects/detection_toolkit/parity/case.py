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

from ..errors import UserError
from ..modeling import Execution

__all__ = ["Case", "CaseError", "Config", "Inputs", "Settings"]


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


class Config(dict[str, Any]):
    """Sizes and switches of the network; reading one that is not there is a clear error."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        super().__init__(values)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise CaseError(f"the config in {self._path} lacks {key!r}")

    def integers(self, names: Mapping[str, str]) -> dict[str, int]:
        """Arguments of a constructor, from {argument: key}."""
        return {argument: int(self[key]) for argument, key in names.items()}


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
        self.read: set[str] = set()
        """Names of the arrays that were asked for."""
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
        self.read.add(name)
        try:
            return self._arrays[name]
        except KeyError:
            raise CaseError(f"{self.path} lacks the array {name!r}") from None

    def config(self, name: str = "config") -> Config:
        """A JSON object, kept as bytes or as a text; those inside it are :class:`Config`, too.

        Raises:
            CaseError: missing or no JSON object.
        """
        array = self.array(name)
        try:
            text = str(array) if array.dtype.kind == "U" else bytes(array).decode()
            document = json.loads(text, object_hook=lambda values: Config(values, self.path))
        except (TypeError, ValueError) as error:
            raise CaseError(f"{name!r} in {self.path} is no JSON document: {error}") from error
        if not isinstance(document, Config):
            raise CaseError(f"{name!r} in {self.path} is no JSON object")
        return document

    def below(self, prefix: str) -> list[str]:
        """Names that start with ``prefix``, in the file's order."""
        return [name for name in self._arrays if name.startswith(prefix)]

    def put(self, name: str, array: np.ndarray) -> None:
        """Replace an array, by the same numbers in other units, say."""
        self._arrays[name] = array

    def unpack(self, names: str, values: str, prefix: str) -> None:
        """Replace a list of names and the list of their values by one array for each name.

        Raises:
            CaseError: a list is missing, or the two differ in length.
        """
        keys, numbers = self.array(names), self.array(values)
        if keys.shape != numbers.shape or len(set(keys.tolist())) != len(keys):
            raise CaseError(
                f"{self.path}: {names} must list each name once, and {values} a number for each; "
                f"they have the shapes {keys.shape} and {numbers.shape}"
            )
        del self._arrays[names], self._arrays[values]
        self._arrays.update({prefix + str(k): np.asarray(x) for k, x in zip(keys, numbers)})


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

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """All weights, which are the arrays below ``prefix``, by their official names."""
        return {name[len(prefix) :]: self.tensor(name) for name in self._case.below(prefix)}
