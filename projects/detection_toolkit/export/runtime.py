"""What runs an ONNX file, ONNX Runtime or OpenVINO, with errors that say what is wrong with it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ..defaults import RUNTIMES
from ..errors import MissingPackageError, UnknownNameError, UserError
from ..program import command_line
from ..texts import shown
from .description import Description, find_description

if TYPE_CHECKING:
    import openvino

__all__ = ["Session", "open_onnx", "open_runtime", "provider_names", "require", "run_session"]

_PROVIDER = "ExecutionProvider"  # with which all names of ONNX Runtime's providers end
_OPENVINO_TYPES = {"f32": "tensor(float)", "u8": "tensor(uint8)", "i64": "tensor(int64)"}
_OUTPUTS = ("boxes", "scores", "labels")
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


class Value(NamedTuple):
    """What a graph takes or gives."""

    name: str
    type: str


class Session(Protocol):
    """What is used of ``onnxruntime.InferenceSession``."""

    def get_inputs(self) -> Sequence[Value]: ...

    def get_outputs(self) -> Sequence[Value]: ...

    def run(
        self, output_names: Sequence[str], input_feed: Mapping[str, np.ndarray]
    ) -> Sequence[np.ndarray]: ...


def require(name: str, what: str, install: str = "onnx onnxruntime onnxscript") -> ModuleType:
    """Import an optional package.

    Args:
        name: of the package.
        what: needs it.
        install: what is to be installed.

    Raises:
        ImportError: it is missing; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs the package {name}: pip install {install} ({error})"
        ) from error


def provider_names(provider: str) -> tuple[str, ...]:
    """ONNX Runtime's names, for a short one such as "cpu" or "cuda"; the CPU does the rest.

    Raises:
        UnknownNameError: the installed ONNX Runtime lacks it; names those that it has.
        ImportError: ONNX Runtime is missing.
    """
    runtime = require("onnxruntime", "an ONNX model")
    short = {
        name.removesuffix(_PROVIDER).lower(): name for name in runtime.get_available_providers()
    }
    if provider.lower() not in short:
        raise UnknownNameError(
            f"this ONNX Runtime has no provider {shown(provider)}; it has {', '.join(short)} "
            "(cuda: pip install onnxruntime-gpu)"
        )
    return tuple(dict.fromkeys([short[provider.lower()], f"CPU{_PROVIDER}"]))


def open_runtime(
    model: str | Path | bytes, runtime: str, *, threads: int = 0
) -> tuple[Session, Description]:
    """Open an exported detector on the CPU, by the runtime of that name.

    Args:
        model: the ONNX file, or its content.
        runtime: of :data:`~detection_toolkit.defaults.RUNTIMES`.
        threads: of the runtime; 0 leaves the number to it.

    Raises:
        UnknownNameError: no such runtime.
        ImportError, FileNotFoundError, ValueError: see :func:`open_onnx`.
    """
    if runtime not in RUNTIMES:
        raise UnknownNameError(f"no runtime {shown(runtime)}: there are {', '.join(RUNTIMES)}")
    if runtime == "openvino":
        return _open_openvino(model, threads)
    return open_onnx(model, threads=threads)


def open_onnx(
    model: str | Path | bytes,
    *,
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> tuple[Session, Description]:
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
    where = _where(model)
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
        raise UserError(f"{where} cannot be opened as an ONNX model: {reason}") from error
    lost = [name for name in providers if name not in session.get_providers()]
    if lost:  # ONNX Runtime itself goes on without it
        raise UserError(f"ONNX Runtime could not start {', '.join(lost)} on this machine")
    return session, _describe(session, session.get_modelmeta().custom_metadata_map, where)


class _OpenVinoSession:
    """A compiled model, called as a session of ONNX Runtime."""

    def __init__(self, model: openvino.CompiledModel):
        self._model = model

    def get_inputs(self) -> list[Value]:
        return [_value(port) for port in self._model.inputs]

    def get_outputs(self) -> list[Value]:
        return [_value(port) for port in self._model.outputs]

    def run(
        self, output_names: Sequence[str], input_feed: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        found = self._model(dict(input_feed))
        return [found[name] for name in output_names]


def _value(port: openvino.ConstOutput) -> Value:
    kind = port.get_element_type().to_string()
    return Value(port.get_any_name(), _OPENVINO_TYPES.get(kind, kind))


def _open_openvino(model: str | Path | bytes, threads: int) -> tuple[Session, Description]:
    """See :func:`open_runtime`."""
    openvino = require("openvino", "the runtime openvino", "openvino")
    onnx = require("onnx", "the runtime openvino")
    where = _where(model)
    content = model if isinstance(model, bytes) else Path(model).read_bytes()
    # In float32, whatever is faster on this processor.
    options: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        metadata = {p.key: p.value for p in onnx.load_from_string(content).metadata_props}
        core = openvino.Core()
        session = _OpenVinoSession(core.compile_model(core.read_model(content), "CPU", options))
    except Exception as error:  # of the packages' own classes
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where} cannot be opened by OpenVINO: {reason}") from error
    return session, _describe(session, metadata, where)


def _where(model: str | Path | bytes) -> str:
    """
    Raises:
        FileNotFoundError: no such file.
    """
    if isinstance(model, bytes):
        return "the model"
    if not Path(model).is_file():
        raise FileNotFoundError(f"no such ONNX model: {model}")
    return str(model)


def _describe(session: Session, metadata: Mapping[str, str], where: str) -> Description:
    """
    Raises:
        UserError: the file is not one that was exported here.
    """
    text = find_description(metadata)
    if text is None:
        raise UserError(
            f"{where} is an ONNX model, but not one that `{command_line('export')}` has written: "
            "it does not say how pictures become its input"
        )
    try:
        description = Description.from_json(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    _check_graph(session, where)
    return description


def _check_graph(session: Session, where: str) -> None:
    """
    Raises:
        UserError: it takes or gives something else than an exported detector.
    """
    takes = {value.name: value.type for value in session.get_inputs()}
    gives = {value.name for value in session.get_outputs()}
    images, sizes = takes.pop("images", None), takes.pop("image_sizes", None)
    if images not in _NUMPY_TYPES or sizes != "tensor(int64)" or takes:
        raise UserError(
            f"{where} is no detector: it must take images (float or uint8) and image_sizes (int64) "
            "and nothing else"
        )
    if not {*_OUTPUTS} <= gives:
        raise UserError(f"{where} is no detector: it must give {', '.join(_OUTPUTS)}")


def run_session(
    session: Session, images: np.ndarray, image_sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (B, D, 4), scores (B, D) and labels (B, D) of a batch.

    Args:
        session: of :func:`open_onnx` or :func:`open_runtime`.
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
