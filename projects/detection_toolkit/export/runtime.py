"""ONNX Runtime, with errors that say what is wrong with a file."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MissingPackageError, UserError
from ..program import command_line
from .description import Description, find_description

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["open_onnx", "require", "run_session"]

_OUTPUTS = ("boxes", "scores", "labels")
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


def require(name: str, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        name: of the package.
        what: needs it.

    Raises:
        ImportError: it is missing; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs the package {name}: pip install onnx onnxruntime onnxscript ({error})"
        ) from error


def open_onnx(
    model: str | Path | bytes,
    *,
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> tuple[InferenceSession, Description]:
    """Open an exported detector.

    Args:
        model: the file, or its content.
        threads: of ONNX Runtime; 0 leaves the number to it.
        providers: what ONNX Runtime computes with, the first choice first, for example
            ``("CUDAExecutionProvider", "CPUExecutionProvider")``.

    Raises:
        ImportError: ONNX Runtime is missing.
        UserError: the installed ONNX Runtime lacks one of the providers.
        FileNotFoundError: no such file.
        ValueError: the file is no ONNX model, or not one that was exported here.
    """
    runtime = require("onnxruntime", "an ONNX model")
    shown = "the model" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise FileNotFoundError(f"no such ONNX model: {shown}")
    available = runtime.get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing:
        raise UserError(
            f"this ONNX Runtime has no {', '.join(missing)}; it has "
            f"{', '.join(available)} (CUDA: pip install onnxruntime-gpu)"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = runtime.InferenceSession(source, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's own classes have no common base
        reason = str(error).partition("\n")[0]
        raise UserError(f"{shown} cannot be opened as an ONNX model: {reason}") from error
    text = find_description(session.get_modelmeta().custom_metadata_map)
    if text is None:
        raise UserError(
            f"{shown} is an ONNX model, but not one that `{command_line('export')}` has written: "
            "it does not say how pictures become its input"
        )
    try:
        description = Description.from_json(text)
    except ValueError as error:
        raise UserError(f"{shown}: {error}") from error
    _check_graph(session, shown)
    return session, description


def _check_graph(session: InferenceSession, shown: str) -> None:
    """
    Raises:
        UserError: it takes or gives something else than an exported detector.
    """
    takes = {value.name: value.type for value in session.get_inputs()}
    gives = {value.name for value in session.get_outputs()}
    images, sizes = takes.pop("images", None), takes.pop("image_sizes", None)
    if images not in _NUMPY_TYPES or sizes != "tensor(int64)" or takes:
        raise UserError(
            f"{shown} is no detector: it must take images (float or uint8) and image_sizes (int64) "
            "and nothing else"
        )
    if not {*_OUTPUTS} <= gives:
        raise UserError(f"{shown} is no detector: it must give {', '.join(_OUTPUTS)}")


def run_session(
    session: InferenceSession, images: np.ndarray, image_sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (B, D, 4), scores (B, D) and labels (B, D) of a batch.

    Args:
        session: of :func:`open_onnx`.
        images: (B, 3, H, W) of 0..255; converted to the type that the graph takes.
        image_sizes: (B, 2) height and width of each image within the batch.

    Raises:
        UserError: the graph fails, or gives something else.
    """
    types = {value.name: value.type for value in session.get_inputs()}
    given = {
        "images": np.ascontiguousarray(images, dtype=_NUMPY_TYPES[types["images"]]),
        "image_sizes": np.asarray(image_sizes, dtype=np.int64),
    }
    try:
        boxes, scores, labels = session.run(list(_OUTPUTS), given)
    except Exception as error:  # ONNX Runtime's own classes have no common base
        reason = str(error).partition("\n")[0]
        raise UserError(f"the ONNX model fails on an image: {reason}") from error
    shapes = [np.shape(value) for value in (boxes, scores, labels)]
    shape = (len(images), *shapes[1][1:2])
    kinds = "".join(np.asarray(value).dtype.kind for value in (boxes, scores, labels))
    if len(shape) != 2 or shapes != [(*shape, 4), shape, shape] or kinds != "ffi":
        raise UserError(
            f"the ONNX model gives boxes, scores and labels of shapes {shapes} and kinds "
            f"{kinds!r}, not those of a detector"
        )
    return boxes, scores, labels
