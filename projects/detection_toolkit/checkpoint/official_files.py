"""Reading and writing checkpoint files of both kinds, safely.

A ``.pth`` is a pickle, which may run any code when it is opened. So files are opened with PyTorch's
``weights_only`` reader, which builds tensors and plain containers, and besides what official
checkpoints hold among their notes: scalars and arrays of NumPy, the command line as a
``Namespace``, and MMEngine's histories of losses, which are left out.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import importlib
import json
import pickle
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..durable import write_durably
from ..errors import MissingPackageError, UserError
from ..program import command_line
from ..texts import parse_json, shown
from .damage import is_old_archive, refused_part
from .official_format import some_names
from .weights import find_weights

__all__ = [
    "CONFIG_FILE",
    "CheckpointFileError",
    "DESCRIPTION",
    "EXTRAS",
    "no_weights",
    "read_checkpoint",
    "read_class_names",
    "split_weights",
    "write_checkpoint",
    "write_official",
    "write_safetensors",
]

CONFIG_FILE = "config.json"
"""What Hugging Face puts beside a file of weights."""
DESCRIPTION = "description"
"""The key of what that tells of the network, in what a file holds."""
EXTRAS = "official_extras"
_SAFETENSORS = ".safetensors"
# Keys of the header of a file of ours, and the version of what they hold.
_FORMAT = "detection_toolkit_format"
_RUN = "detection_toolkit_run"
_CONFIG = "detection_toolkit_config"
_VERSION = 1
_TORCH = (".pth", ".pt")
_HUGGING_FACE = (_SAFETENSORS, ".bin")


class CheckpointFileError(UserError):
    """A checkpoint file is damaged, unsafe, or holds something else; the message says which."""


def read_checkpoint(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Everything that a checkpoint file holds, and, as "description", what a ``config.json`` beside
    it tells, if it is named as Hugging Face's are.

    Args:
        path: a ``.safetensors``, or any file of PyTorch.
        allow_pickle: run the code of a pickle that holds more than tensors and plain values. Only
            for files from a trusted source; a file that needs none is read without.

    Raises:
        FileNotFoundError: no such file.
        CheckpointFileError: it is damaged, is no checkpoint, or needs ``allow_pickle``.
        ImportError: it is a ``.safetensors`` and that package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    checkpoint = _read_file(path, allow_pickle)
    if path.suffix in _HUGGING_FACE:
        description = _read_description(path)
        if description is not None:
            checkpoint[DESCRIPTION] = description
    return checkpoint


def _read_description(path: Path) -> dict[str, Any] | None:
    """What the ``config.json`` beside a file of weights tells; None if there is none.

    Raises:
        CheckpointFileError: it is damaged.
    """
    file = path.with_name(CONFIG_FILE)
    if not file.is_file():
        return None
    try:
        description = parse_json(file.read_bytes())
    except ValueError as error:
        raise CheckpointFileError(f"{file} cannot be read: {error}") from error
    # Other programs write files of this name, too.
    return description if isinstance(description, dict) and "model_type" in description else None


def _read_file(path: Path, allow_pickle: bool) -> dict[str, Any]:
    if path.suffix == _SAFETENSORS:
        return _read_safetensors(path)
    with path.open("rb"):
        pass  # what the system refuses to open is not damaged, and its own error says why
    if not allow_pickle and is_old_archive(path):
        raise CheckpointFileError(
            f"{path} is a tar file, as PyTorch wrote them before 2017, and opening it may run any "
            "code. If you trust its source, set train.allow_pickle=true"
        )
    try:
        checkpoint = _load(path, allow_pickle=allow_pickle)
    except pickle.UnpicklingError as error:
        refused = refused_part(str(error))
        if refused and not allow_pickle:
            raise CheckpointFileError(
                f"{path} holds more than tensors and plain values, and opening it would run code. "
                "If you trust its source, set train.allow_pickle=true, or convert it with "
                f"`{command_line('convert checkpoint')} --allow-pickle`. "
                f"PyTorch says: {refused}"
            ) from error
        # PyTorch's message is advice on opening the file unsafely.
        raise _damaged(path, "not a pickle of tensors") from error
    except (
        # What torch.load meets in truncated or foreign files.
        AttributeError,
        EOFError,
        ImportError,
        IndexError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        UnicodeDecodeError,
        ValueError,
        struct.error,
    ) as error:
        raise _damaged(path, f"{type(error).__name__} {error}".strip()) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointFileError(f"{path} holds a {type(checkpoint).__name__}, no checkpoint")
    return dict(checkpoint)


def read_class_names(path: str | Path) -> list[str] | None:
    """The class names that a file on this machine tells of its run, without reading its weights.

    Returns:
        None where it tells none, or cannot be read so: loading it says why.
    """
    path = Path(path)
    try:
        if path.suffix == _SAFETENSORS:
            with importlib.import_module("safetensors").safe_open(str(path), "pt") as file:
                run = _told(file.metadata() or {}, path).get("run")
        else:
            with _notes_allowed():
                run = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("run")
    except Exception:  # whatever it is, see above
        return None
    names = run.get("classes") if isinstance(run, Mapping) else None
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        return None
    return list(names)


def _load(path: Path, *, allow_pickle: bool) -> Any:
    with _notes_allowed():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not allow_pickle:
                raise
    return torch.load(path, map_location="cpu", weights_only=False)


def split_weights(
    checkpoint: Mapping[str, Any], path: str | Path, wanted: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a checkpoint, and the tensors that a conversion set aside.

    Args:
        checkpoint: as :func:`read_checkpoint` returns it; see :func:`~.weights.find_weights` for
            where the weights may be.
        path: of the file, for messages.
        wanted: names of the model's tensors, where they are known.

    Raises:
        CheckpointFileError: there are no weights.
    """
    weights = find_weights(checkpoint, wanted).any
    if not weights:
        raise no_weights(checkpoint, path)
    return weights, dict(checkpoint.get(EXTRAS) or {})


def no_weights(checkpoint: Mapping[str, Any], path: str | Path) -> CheckpointFileError:
    """The error of a file without a tensor where weights are expected."""
    held = some_names([str(key) for key in checkpoint], 5) or "nothing"
    return CheckpointFileError(f"{path} holds no weights, but {held}")


def write_checkpoint(
    path: str | Path,
    weights: Mapping[str, Tensor],
    extras: Mapping[str, Tensor],
    *,
    classes: Sequence[str] = (),
) -> None:
    """Write converted weights so that Detectron2's ``DetectionCheckpointer`` reads them.

    The file appears under its name only when it is complete.

    Args:
        path: ending in ``.pth``, ``.pt`` or ``.safetensors``.
        weights: under our names.
        extras: tensors that the way back needs; kept apart from the weights.
        classes: their names, where they are known.

    Raises:
        CheckpointFileError: another ending.
        ImportError: ``.safetensors`` without that package.
    """
    path = Path(path)
    if path.suffix == _SAFETENSORS:
        tensors = {**weights, **{f"{EXTRAS}.{name}": value for name, value in extras.items()}}
        write_safetensors(path, tensors, run={"classes": list(classes)} if classes else None)
        return
    _need_torch_suffix(path)
    checkpoint: dict[str, Any] = {"model": dict(weights), EXTRAS: dict(extras)}
    if classes:
        checkpoint["run"] = {"classes": list(classes)}
    write_durably(path, lambda file: torch.save(checkpoint, file))


def write_official(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write what an official file holds (:func:`~.official.official_file`) as its readers want it.

    Raises:
        CheckpointFileError: the path does not end in ``.pth`` or ``.pt``, or, where the content is
            tensors alone, in ``.safetensors``.
        ImportError: ``.safetensors`` without that package.
    """
    path = Path(path)
    tensors = {name: x for name, x in content.items() if isinstance(x, Tensor)}
    if path.suffix == _SAFETENSORS and len(tensors) == len(content):
        _save_safetensors(path, tensors, {})
        return
    _need_torch_suffix(path)
    write_durably(path, lambda file: torch.save(dict(content), file))


def write_safetensors(
    path: str | Path,
    weights: Mapping[str, Tensor],
    *,
    run: Mapping[str, Any] | None = None,
    config: str = "",
) -> None:
    """Write weights under our names; what is told beside them stands in the file's header.

    Args:
        path: ending in ``.safetensors``.
        weights: under our names.
        run: what a checkpoint tells of its run, in plain values, such as "classes".
        config: of the model, as YAML, for whoever has the file alone; it is not read.

    Raises:
        ImportError: the package is not installed.
        OSError: the file cannot be written.
    """
    told = {} if run is None else {_RUN: json.dumps(dict(run))}
    told |= {_CONFIG: config} if config else {}
    _save_safetensors(Path(path), weights, {_FORMAT: str(_VERSION), **told})


def _save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    safetensors = _import_safetensors()
    # Tensors that share memory cannot be written.
    own = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    content = safetensors.save(own, {"format": "pt", **metadata})
    write_durably(path, lambda file: file.write(content))


def _damaged(path: Path, reason: str) -> CheckpointFileError:
    return CheckpointFileError(
        f"{path} cannot be read: it is damaged or no checkpoint ({reason.splitlines()[0]})"
    )


def _need_torch_suffix(path: Path) -> None:
    if path.suffix not in _TORCH:
        raise CheckpointFileError(f"{path} must end in {' or '.join(_TORCH)}")


def _import_safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError(
            'files ending in .safetensors need an optional package: pip install "safetensors"; '
            "or use the ending .pth"
        ) from error
    return safetensors.torch


def _read_safetensors(path: Path) -> dict[str, Any]:
    safetensors = _import_safetensors()
    try:
        tensors = safetensors.load_file(str(path))
        with importlib.import_module("safetensors").safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # the package's own error derives from Exception alone
        raise _damaged(path, str(error)) from error
    prefix = f"{EXTRAS}."
    return {
        **_told(metadata, path),
        "model": {name: value for name, value in tensors.items() if not name.startswith(prefix)},
        EXTRAS: {
            name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)
        },
    }


def _told(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What the header of a file of ours tells of its run."""
    version = metadata.get(_FORMAT)
    if version is None:  # of another program
        return {}
    if not version.isdecimal() or int(version) > _VERSION:
        raise CheckpointFileError(
            f"{path} is in version {shown(version[:20])} of the format, and this program reads up "
            f"to {_VERSION}: it needs a newer one"
        )
    try:
        run = parse_json(metadata.get(_RUN, "{}"))
    except ValueError as error:
        raise _damaged(path, f"its header: {error}") from error
    return {"run": run} if isinstance(run, dict) else {}


class _Inert:
    """Stands for an object of a package that is not needed to read weights."""

    def __setstate__(self, state: Any) -> None:
        pass


def _no_attribute(owner: Any, name: str) -> None:
    return None


@contextlib.contextmanager
def _notes_allowed() -> Iterator[None]:
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    if safe_globals is None:  # PyTorch before 2.5 has no such list
        yield
        return
    rebuild = np.float64(0).__reduce__()[0]  # its module has another name since NumPy 2
    array = np.zeros(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU"}
    with safe_globals(
        [
            (rebuild, "numpy.core.multiarray.scalar"),
            (rebuild, "numpy._core.multiarray.scalar"),
            (array, "numpy.core.multiarray._reconstruct"),
            (array, "numpy._core.multiarray._reconstruct"),
            np.ndarray,
            (_Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
            # Of the history's methods; nothing is looked up.
            (_no_attribute, "builtins.getattr"),
            (_no_attribute, "__builtin__.getattr"),
            np.dtype,
            codecs.encode,
            argparse.Namespace,
            *kinds,
        ]
    ):
        yield
